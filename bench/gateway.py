"""What the gateway costs: an endpoint asked directly, and through `serve_apps/gateway.yaml`.

The endpoint and its load are those of `bench/serving.py`: a small model, one replica, streamed
completions of TOKENS tokens asked for by `vllm bench serve`, with a key that has limits. The
gateway stands on the same cluster and asks over Serve's own port, as it does for any application.
Closed loops of 1 and 16 clients; both ways in turn, one after the other.

    python bench/gateway.py [--json FILE] [--repetitions N]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import serving as endpoint
import yaml
from common import machine, table, write_json
from serving import Server

CLIENTS = {1: 24, 16: 128}
"""Clients of a closed loop → requests over all of them."""
WAYS = ("direct", "gateway")


def main() -> None:
    """Measure both ways, alternately, and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--repetitions", type=int, default=2)
    args = parser.parse_args()
    result = measure(args.repetitions)
    print(table(summary(result["repetitions"])))
    for key, value in result.items():
        if key.startswith(("ratio", "added")):
            print(f"{key} {value:.3f}")
    if args.json:
        write_json(args.json, result)


def measure(repetitions: int) -> dict[str, Any]:
    """Every repetition, and medians of the gateway's figures by those of the direct way."""
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="m-") as name:
        folder = Path(name)
        model = endpoint.write_model(str(folder / "storage"))
        with endpoint.platform(folder, _one_replica()) as direct:
            deploy_gateway(folder)
            servers = {"direct": direct, "gateway": replace(direct, url=f"{direct.url}/gateway")}
            for server in servers.values():
                endpoint.first_token(server.url, server.key)
            for _ in range(repetitions):
                found = {way: ask(folder, server, model) for way, server in servers.items()}
                runs += [
                    {"clients": clients, **{way: found[way][clients] for way in WAYS}}
                    for clients in CLIENTS
                ]
    return {
        "machine": machine(),
        "tokens_per_request": endpoint.TOKENS,
        "repetitions": runs,
        **ratios(runs),
    }


def ask(folder: Path, server: Server, model: str) -> dict[int, dict[str, float]]:
    """The figures of each closed loop, by clients."""
    loads = [{"requests": n, "clients": clients} for clients, n in CLIENTS.items()]
    warm = {"requests": 32, "clients": 16}
    _, *found = endpoint.bench_serve(folder, server, model, [warm, *loads])
    return dict(zip(CLIENTS, found, strict=True))


def ratios(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Medians over repetitions, and the time to the first token that the gateway adds."""
    found = {}
    for clients in CLIENTS:
        pairs = [(run["gateway"], run["direct"]) for run in runs if run["clients"] == clients]
        for key in ("tokens_per_s", "ttft_p50_ms", "itl_mean_ms"):
            ratio = statistics.median(through[key] / direct[key] for through, direct in pairs)
            found[f"ratio_{key}_{clients}_clients"] = ratio
        more = [through["ttft_p50_ms"] - direct["ttft_p50_ms"] for through, direct in pairs]
        found[f"added_ttft_p50_ms_{clients}_clients"] = statistics.median(more)
    return found


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each load and way: medians over the repetitions."""
    rows = []
    for clients in CLIENTS:
        for way in WAYS:
            figures = [run[way] for run in runs if run["clients"] == clients]
            medians = {k: statistics.median(f[k] for f in figures) for k in endpoint.FIGURES}
            rounded = {key: f"{value:.1f}" for key, value in medians.items()}
            rows.append({"clients": clients, "way": way, **rounded})
    return rows


# --- servers ---------------------------------------------------------------------------------


def _one_replica() -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(_app("llm").read_text())
    llm = config["applications"][0]["args"]["llm_configs"][0]
    names = {"model_id": endpoint.MODEL, "model_source": endpoint.MODEL}
    llm["model_loading_config"] = names
    llm["deployment_config"]["autoscaling_config"]["max_replicas"] = 1
    return config


def deploy_gateway(folder: Path) -> None:
    """Onto the cluster of `endpoint.platform`, for its one model, with one replica."""
    config = yaml.safe_load(_app("gateway").read_text())
    app = config["applications"][0]
    app["args"]["models"] = {endpoint.MODEL: {"to": [{"app": "llm"}]}}
    app["deployments"][0]["autoscaling_config"]["max_replicas"] = 1
    file = folder / "gateway.yaml"
    file.write_text(yaml.safe_dump(config))
    homes = {"MANTA_HOME": str(folder / "home"), "MANTA_STORAGE": str(folder / "storage")}
    endpoint.manta(["deploy", str(file)], os.environ | homes)


def _app(name: str) -> Path:
    return endpoint.PROJECT / "serve_apps" / f"{name}.yaml"


if __name__ == "__main__":
    main()
