"""What is left of the endpoint's throughput when ten times as much is asked as it can do.

The same endpoint and model as `bench/serving.py`. First the peak: closed loops of 16 and of as
many clients as the guard lets in. Then an open loop: requests come at fixed times, ten times as
many as the best loop finished, whatever becomes of them. Goodput is tokens a second of requests
that end whole within DEADLINE_S.

    python bench/overload.py [--json FILE] [--in-flight N] [--times 10] [--seconds 75]

The load generator shares the cores with the endpoint, and goes before it, as if it had its own.
What it uses is told, as part of a core; the peak's loops use less of it. How late it sends a
request is told too: so late it may also see an answer. How long a refusal took without it is in
HAProxy's log, in whole milliseconds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import serving as endpoint
import yaml
from common import machine, table, write_json
from serving import Server

from manta.cluster import processes

DEADLINE_S = 30.0
WARM_S, PEAK_S, RAMP_S = 2.0, 10.0, 15.0
"""Of the closed loops, the first for warmth; what of the open loop is not counted."""
LOGGED = re.compile(rb"/-?\d+/-?\d+/-?\d+/(?P<total_ms>\d+) (?P<status>\d{3}) ")
"""In a line of HAProxy's log: TR/Tw/Tc/Tr/Ta and the status."""
KINDS = {"replica": "ServeReplica", "engine": "VLLM", "HAProxy": "bin/haproxy"}
"""Of processes that serve → what their command begins with."""
ANSWER = b"data: {"
USED = b'"completion_tokens":%d' % endpoint.TOKENS
"""In the event before the last one of a stream that is whole."""


@dataclass
class Asked:
    """What became of the requests of one loop. Times are seconds since it began."""

    tokens: list[tuple[float, float]] = field(default_factory=list)
    """Of each event when it came, and how many tokens it had; of requests that ended in time."""
    outcomes: Counter[str] = field(default_factory=Counter)
    refused_s: list[float] = field(default_factory=list)
    """How long the refused waited for their answer."""
    late_s: list[float] = field(default_factory=list)
    """How much later than they should the open loop's requests were sent."""
    unlike: list[str] = field(default_factory=list)
    """Refusals that are not as they must be."""
    generator_cpu_s: float = 0.0
    seconds: float = 0.0

    def goodput(self, since_s: float, until_s: float) -> float:
        """Tokens a second, of requests that ended whole in time, that came in this time."""
        good = sum(number for at, number in self.tokens if since_s <= at < until_s)
        return good / (until_s - since_s)


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--in-flight", type=int, help="max_requests_in_flight; else the file's.")
    parser.add_argument("--times", type=float, default=10)
    parser.add_argument("--kv-blocks", type=int, help="of the engine's cache; else all its room.")
    parser.add_argument("--seconds", type=float, default=75, help="of the overload.")
    args = parser.parse_args()
    result = measure(args)
    print(table(result["loops"]))
    print(table(result["rss"]))
    for key, value in result.items():
        if key not in ("loops", "rss", "machine"):
            print(key, value)
    if args.json:
        write_json(args.json, result)


def measure(asked_for: argparse.Namespace) -> dict[str, Any]:
    """The peak, the overload, and what of the one is left in the other."""
    times, seconds = asked_for.times, asked_for.seconds
    with tempfile.TemporaryDirectory(prefix="m-") as name:
        folder = Path(name)
        config = yaml.safe_load((endpoint.PROJECT / "serve_apps" / "llm.yaml").read_text())
        args = config["applications"][0]["args"]
        llm = args["llm_configs"][0]
        llm["model_loading_config"] = {
            "model_id": endpoint.MODEL,
            "model_source": endpoint.MODEL,
        }
        llm["deployment_config"]["autoscaling_config"]["max_replicas"] = 1
        if asked_for.in_flight:
            args["guard"]["max_requests_in_flight"] = asked_for.in_flight
        if asked_for.kv_blocks:
            llm["engine_kwargs"]["num_gpu_blocks_override"] = asked_for.kv_blocks
        room = args["guard"]["max_requests_in_flight"]
        endpoint.write_model(str(folder / "storage"))
        with (
            haproxy_log() as logged,
            endpoint.platform(folder, config) as server,
            memory(folder) as sizes,
        ):
            asyncio.run(closed(server, 4, WARM_S))
            loops = {n: asyncio.run(closed(server, n, PEAK_S)) for n in (16, room)}
            peaks = {n: one.goodput(PEAK_S / 3, PEAK_S) for n, one in loops.items()}
            print(f"closed loops: {peaks}", file=sys.stderr, flush=True)
            peak = max(peaks.values())
            began = time.monotonic()
            logged.clear()
            over = asyncio.run(opened(server, times * peak / endpoint.TOKENS, seconds))
            print(f"open loop: {over.outcomes}", file=sys.stderr, flush=True)
            kept = [mib for at, mib in sizes if RAMP_S < at - began < seconds]
    goodput = over.goodput(RAMP_S, seconds)
    rows = [row(f"closed, {n} clients", one, PEAK_S / 3, PEAK_S) for n, one in loops.items()] + [
        row(f"open, {times:g} times the peak", over, RAMP_S, seconds)
    ]
    return {
        "machine": machine(),
        "max_requests_in_flight": room,
        "loops": rows,
        "ratio_goodput": goodput / peak,
        "refused_p50_ms": percentile_ms(over.refused_s, 50),
        "refused_p99_ms": percentile_ms(over.refused_s, 99),
        "refused_max_ms": percentile_ms(over.refused_s, 100),
        "refused_p50_and_p99_ms_by_haproxy": [percentile_ms(logged, n) for n in (50, 99)],
        "generator_late_p50_and_p99_ms": [percentile_ms(over.late_s, n) for n in (50, 99)],
        "refusals_unlike": over.unlike[:3],
        "rss": [{"process": kind, **quarters([mib[kind] for mib in kept])} for kind in KINDS],
    }


def quarters(mib: Sequence[int]) -> dict[str, float]:
    """Means over each quarter of the time that counts."""
    size = len(mib) // 4
    parts = [mib[n * size : (n + 1) * size] for n in range(4)]
    return {f"mib_{n}": round(statistics.fmean(part), 1) for n, part in enumerate(parts, 1)}


def percentile_ms(seconds: Sequence[float], percent: int) -> float:
    """The nearest-rank percentile, in milliseconds; 0 of nothing."""
    ordered = sorted(seconds) or [0.0]
    return 1000 * ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]


def row(name: str, asked: Asked, since_s: float, until_s: float) -> dict[str, Any]:
    """One loop as a line of the table."""
    return {
        "loop": name,
        "goodput_tokens_per_s": round(asked.goodput(since_s, until_s), 1),
        **{what: asked.outcomes[what] for what in ("whole", "late", "refused", "failed")},
        "generator_cores": round(asked.generator_cpu_s / asked.seconds, 2),
    }


# --- load ------------------------------------------------------------------------------------


async def closed(server: Server, clients: int, seconds: float) -> Asked:
    """Each client asks again as soon as it is answered, for so long."""
    asked = Asked()
    async with _session(server) as session:
        began = time.monotonic()

        async def work() -> None:
            while time.monotonic() - began < seconds:
                await one(session, server.url, asked, began)

        with _cpu(asked):
            await asyncio.gather(*(work() for _ in range(clients)))
    return asked


async def opened(server: Server, requests_per_s: float, seconds: float) -> Asked:
    """A request each 1 / `requests_per_s`, for so long; returns when all have ended."""
    asked, tasks = Asked(), []
    async with _session(server) as session:
        began = time.monotonic()
        with _cpu(asked):
            for number in range(int(seconds * requests_per_s)):
                due = began + number / requests_per_s
                await asyncio.sleep(due - time.monotonic())
                asked.late_s.append(time.monotonic() - due)
                tasks.append(asyncio.create_task(one(session, server.url, asked, began)))
            await asyncio.gather(*tasks)
    return asked


async def one(session: aiohttp.ClientSession, url: str, asked: Asked, began: float) -> None:
    """Send one request and note what becomes of it."""
    body = {
        "model": endpoint.MODEL,
        "prompt": "def function(argument):\n",
        "max_tokens": endpoint.TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    sent, times = time.monotonic(), []
    try:
        async with session.post(f"{url}/v1/completions", json=body) as answer:
            if answer.status == 503:
                text = await answer.read()
                asked.refused_s.append(time.monotonic() - sent)
                asked.outcomes["refused"] += 1
                if not is_refusal(text, answer.headers.get("retry-after")):
                    asked.unlike.append(text[:200].decode(errors="replace"))
                return
            answer.raise_for_status()
            used = last = b""
            async for line in answer.content:
                if line.startswith(ANSWER):
                    times.append(time.monotonic() - began)
                used, last = (last, line) if line.strip() else (used, last)
    except (aiohttp.ClientError, TimeoutError) as error:
        asked.outcomes["failed"] += 1
        print(f"failed: {error!r}"[:200], file=sys.stderr)
        return
    is_whole = last.startswith(b"data: [DONE]") and USED in used
    in_time = time.monotonic() - sent <= DEADLINE_S
    asked.outcomes["failed" if not is_whole else "whole" if in_time else "late"] += 1
    if is_whole and in_time:  # an engine that is busy puts several tokens into one event
        events = times[:-1]
        asked.tokens += [(at, endpoint.TOKENS / len(events)) for at in events]


def is_refusal(text: bytes, retry_after: str | None) -> bool:
    """Whether a 503 is the guard's: OpenAI's error body, and when to come again."""
    try:
        code = json.loads(text)["error"]["code"]
    except (ValueError, KeyError, TypeError):
        return False
    return bool(code == "overloaded" and retry_after)


def _session(server: Server) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        headers={"Authorization": f"Bearer {server.key}"},
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=120),
    )


@contextmanager
def _cpu(asked: Asked) -> Iterator[None]:
    cpu_s, began = time.process_time(), time.monotonic()
    yield
    asked.generator_cpu_s = time.process_time() - cpu_s
    asked.seconds = time.monotonic() - began


@contextmanager
def haproxy_log() -> Iterator[list[float]]:
    """Seconds that each 503 took by HAProxy's log, which the next cluster sends here."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as heard:
        heard.bind(("127.0.0.1", 0))
        os.environ["RAY_SERVE_HAPROXY_LOG_TARGET"] = f"127.0.0.1:{heard.getsockname()[1]}"
        refused_s: list[float] = []

        def listen() -> None:
            while line := heard.recv(4096):
                found = LOGGED.search(line)
                if found and found["status"] == b"503":
                    refused_s.append(int(found["total_ms"]) / 1000)

        thread = threading.Thread(target=listen)
        thread.start()
        try:
            yield refused_s
        finally:
            heard.sendto(b"", heard.getsockname())
            thread.join()


@contextmanager
def memory(folder: Path) -> Iterator[list[tuple[float, dict[str, int]]]]:
    """Each second the MiB in memory of all that serves, by kind of process."""
    known = json.loads((folder / "home" / "clusters" / "local" / "cluster.json").read_text())
    sizes: list[tuple[float, dict[str, int]]] = []
    done = threading.Event()

    def look() -> None:
        serving = by_kind(known["cluster_id"])
        while not done.wait(1.0):
            total = {
                kind: sum(one.memory_info().rss for one in each if one.is_running()) // 2**20
                for kind, each in serving.items()
            }
            sizes.append((time.monotonic(), total))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield sizes
    finally:
        done.set()
        thread.join()


def by_kind(cluster_id: str) -> dict[str, list[psutil.Process]]:
    """The cluster's processes that serve."""
    found: dict[str, list[psutil.Process]] = {kind: [] for kind in KINDS}
    for process in processes.members(cluster_id):
        program = " ".join(process.cmdline()[:1])
        for kind, mark in KINDS.items():
            if mark in program:
                found[kind].append(process)
    return found


if __name__ == "__main__":
    main()
