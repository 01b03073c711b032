"""What the gateway costs: an application asked directly, and through `serve_apps/gateway.yaml`.

The application (bench/light_app.py) has no engine and is guarded as all are: what is measured is
the way to it. The gateway stands on the same cluster, one replica, and asks over Serve's own
port, as it does for any application. Closed loops of 1 and 16 clients with a key that has limits
ask for whole answers, and for streams of 64 events 5 ms apart; both ways in turn.

    python bench/gateway.py [--json FILE] [--repetitions N]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp
import serving as endpoint
import yaml
from common import machine, table, write_json
from serving import Server

CLIENTS = (1, 16)
LOOP_S, WARM_S = 4.0, 1.0
WAYS = ("direct", "gateway")
LAST = b"data: [DONE]"


@dataclass
class Asked:
    """What became of the requests of one loop, in seconds."""

    first_s: list[float] = field(default_factory=list)
    """To the first bytes of the answer's body."""
    whole_s: list[float] = field(default_factory=list)


def main() -> None:
    """Measure both ways, alternately, and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--repetitions", type=int, default=5)
    args = parser.parse_args()
    os.nice(endpoint.NICENESS)
    result = measure(args.repetitions)
    print(table(summary(result["repetitions"])))
    for key, value in result.items():
        if key.startswith(("ratio", "added")):
            print(f"{key} {value:.3f}")
    if args.json:
        write_json(args.json, result)


def measure(repetitions: int) -> dict[str, Any]:
    """Every repetition, and medians of the gateway's figures by those of the direct way."""
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)  # replicas find the application there
    app = {"name": "light", "route_prefix": "/", "import_path": "light_app:app"}
    config = {"applications": [app | {"args": {"guard": {"keys": "required"}}}]}
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="m-") as name:
        folder = Path(name)
        with endpoint.platform(folder, config) as direct:
            deploy_gateway(folder)
            servers = {"direct": direct, "gateway": replace(direct, url=f"{direct.url}/gateway")}
            for server in servers.values():
                endpoint.first_token(server.url, server.key)
            for _ in range(repetitions):
                runs += one_round(servers)
    return {"machine": machine(), "loop_s": LOOP_S, "repetitions": runs, **ratios(runs)}


def one_round(servers: dict[str, Server]) -> list[dict[str, Any]]:
    """Each load both ways."""
    return [
        {
            "load": f"{clients} {'streams' if stream else 'answers'}",
            **{way: asyncio.run(loop(server, clients, stream)) for way, server in servers.items()},
        }
        for stream in (False, True)
        for clients in CLIENTS
    ]


async def loop(server: Server, clients: int, stream: bool) -> dict[str, float]:
    """Each client asks again as soon as it is answered; figures of LOOP_S."""
    asked, headers = Asked(), {"Authorization": f"Bearer {server.key}"}
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(headers=headers, connector=connector) as session:
        began = time.perf_counter()

        async def work() -> None:
            while (now := time.perf_counter() - began) < WARM_S + LOOP_S:
                await one(session, server.url, stream, asked if now >= WARM_S else Asked())

        await asyncio.gather(*(work() for _ in range(clients)))
    return {
        "requests_per_s": len(asked.whole_s) / LOOP_S,
        "first_p50_ms": 1000 * statistics.median(asked.first_s),
        "whole_p50_ms": 1000 * statistics.median(asked.whole_s),
        "whole_p99_ms": 1000 * statistics.quantiles(asked.whole_s, n=100)[-1],
    }


async def one(session: aiohttp.ClientSession, url: str, stream: bool, asked: Asked) -> None:
    """Send one request; ends the benchmark if its answer is not whole."""
    body = {"model": endpoint.MODEL, "prompt": "def", "max_tokens": 64, "stream": stream}
    sent = time.perf_counter()
    async with session.post(f"{url}/v1/completions", json=body) as answer:
        first = await answer.content.readany()
        asked.first_s.append(time.perf_counter() - sent)
        rest = first + await answer.read()
    asked.whole_s.append(time.perf_counter() - sent)
    if answer.status != 200 or (stream and LAST not in rest):
        raise SystemExit(f"{answer.status}: {rest[-200:]!r}")


def ratios(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Medians over repetitions: requests/s, and what the gateway adds to a request."""
    found = {}
    for load in dict.fromkeys(run["load"] for run in runs):
        pairs = [(run["gateway"], run["direct"]) for run in runs if run["load"] == load]
        name = load.replace(" ", "_")
        found[f"ratio_requests_per_s_{name}"] = statistics.median(
            through["requests_per_s"] / direct["requests_per_s"] for through, direct in pairs
        )
        for key in ("first_p50_ms", "whole_p50_ms"):
            more = statistics.median(through[key] - direct[key] for through, direct in pairs)
            found[f"added_{key}_{name}"] = more
    return found


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each load and way: medians over the repetitions."""
    rows = []
    for load in dict.fromkeys(run["load"] for run in runs):
        for way in WAYS:
            figures = [run[way] for run in runs if run["load"] == load]
            medians = {key: statistics.median(f[key] for f in figures) for key in figures[0]}
            rows.append({"load": load, "way": way, **{k: f"{v:.1f}" for k, v in medians.items()}})
    return rows


def deploy_gateway(folder: Path) -> None:
    """Onto the cluster of `endpoint.platform`, for its one model, with one replica."""
    config = yaml.safe_load((endpoint.PROJECT / "serve_apps" / "gateway.yaml").read_text())
    app = config["applications"][0]
    app["args"]["models"] = {endpoint.MODEL: {"to": [{"app": "light"}]}}
    app["deployments"][0]["autoscaling_config"]["max_replicas"] = 1
    file = folder / "gateway.yaml"
    file.write_text(yaml.safe_dump(config))
    homes = {"MANTA_HOME": str(folder / "home"), "MANTA_STORAGE": str(folder / "storage")}
    endpoint.manta(["deploy", str(file)], os.environ | homes)


if __name__ == "__main__":
    main()
