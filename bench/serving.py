"""The platform's endpoint beside the bare vLLM server.

Both serve the same small model with the same engine arguments, one after the other alone on the
machine, and are asked by the same load generator: streamed completions of TOKENS tokens, from 1,
16 and 64 clients, each of which sends its next request when the last is answered. Inter-token
latency (ITL) is the gap between two pieces of a stream that hold text.

    python bench/serving.py [--json FILE] [--repetitions N]

The endpoint is `serve_apps/llm.yaml`, held at one replica, on a cluster of `manta up`, API keys
included. Its fast path is on; RAY_SERVE_ENABLE_HA_PROXY=0 and its companions in the environment
switch it off, to compare.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml
from common import machine, table, write_json

PROJECT = Path(__file__).parents[1]
MANTA = str(Path(sys.executable).with_name("manta"))
MODEL, TOKENS = "bench", 64
REQUESTS = {1: 16, 16: 96, 64: 256}
"""Clients → requests of one repetition, over all clients."""
START_TIMEOUT_S = 600
RAY_WORKER_NICENESS = 15
"""Ray's default: what a cluster runs gives way to others. So must bare server and load generator,
or the generator, which shares two cores with both, would hold up only one of them."""
HEADERS: dict[str, str] = {}
"""Sent with each request: the API key, once there is one. The bare server does not look at it."""
SWITCHES = (
    "RAY_SERVE_ENABLE_HA_PROXY",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED",
    "RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING",
)


@dataclass(frozen=True)
class Stream:
    """When the pieces of one answer came, in seconds after the request was sent."""

    times_s: tuple[float, ...]

    @property
    def gaps_s(self) -> list[float]:
        """Time from each piece to the next."""
        return [b - a for a, b in zip(self.times_s, self.times_s[1:], strict=False)]


def main() -> None:
    """Measure both, alternately, and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--repetitions", type=int, default=3)
    args = parser.parse_args()
    os.nice(RAY_WORKER_NICENESS)
    result = measure(args.repetitions)
    print(table(summary(result)))
    for key, value in result.items():
        if key.startswith("ratio"):
            print(f"{key} {value:.3f}")
    if args.json:
        write_json(args.json, result)


def measure(repetitions: int) -> dict[str, Any]:
    """Every repetition, and medians of the ratios, endpoint over bare server."""
    with tempfile.TemporaryDirectory(prefix="m-") as name:
        folder = Path(name)
        config = yaml.safe_load((PROJECT / "serve_apps" / "llm.yaml").read_text())
        llm = config["applications"][0]["args"]["llm_configs"][0]
        llm["model_loading_config"] = {"model_id": MODEL, "model_source": MODEL}
        # One engine on each side: a second, starting on the same cores, would be measured too.
        llm["deployment_config"]["autoscaling_config"]["max_replicas"] = 1
        model = write_model(str(folder / "storage"))
        rounds = [
            {
                "bare": measured(lambda: bare_server(folder, model, llm)),
                "endpoint": measured(lambda: platform(folder, config)),
            }
            for _ in range(repetitions)
        ]
    runs = [
        {"clients": clients, **{name: asked[clients] for name, (_, asked) in one.items()}}
        for one in rounds
        for clients in REQUESTS
    ]
    starts = [{name: start_s for name, (start_s, _) in one.items()} for one in rounds]
    return {
        "machine": machine(),
        "switches": {name: os.environ[name] for name in SWITCHES if name in os.environ},
        "tokens_per_request": TOKENS,
        "start_s": starts,
        "repetitions": runs,
        **ratios(runs),
        "ratio_start": statistics.median(s["endpoint"] / s["bare"] for s in starts),
    }


def measured(
    server: Callable[[], AbstractContextManager[tuple[str, float]]],
) -> tuple[float, dict[int, dict[str, float]]]:
    """Start one of the two alone and ask it: its start in s, and its figures by clients."""
    with server() as (url, start_s):
        ask(url, 16, 32)  # warm
        return start_s, {clients: ask(url, clients, n) for clients, n in REQUESTS.items()}


def ratios(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Median over repetitions of the endpoint's figure over the bare server's."""
    found = {}
    for clients in REQUESTS:
        pairs = [(run["endpoint"], run["bare"]) for run in runs if run["clients"] == clients]
        # The mean gap, not its median: a front end that sends tokens in bunches has a median of 0.
        for key in ("tokens_per_s", "ttft_p50_ms", "itl_mean_ms"):
            values = [endpoint[key] / bare[key] for endpoint, bare in pairs]
            found[f"ratio_{key}_{clients}_clients"] = statistics.median(values)
    return found


def summary(result: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each number of clients and server: medians over the repetitions."""
    rows = []
    for clients in REQUESTS:
        for server in ("bare", "endpoint"):
            figures = [run[server] for run in result["repetitions"] if run["clients"] == clients]
            medians = {key: statistics.median(f[key] for f in figures) for key in figures[0]}
            rounded = {key: f"{value:.1f}" for key, value in medians.items()}
            rows.append({"clients": clients, "server": server, **rounded})
    return rows


# --- load ------------------------------------------------------------------------------------


def ask(url: str, clients: int, requests: int) -> dict[str, float]:
    """Send `requests` streamed completions from `clients` at once; figures over all of them."""
    began = time.perf_counter()
    streams = asyncio.run(_ask_all(url, clients, requests))
    seconds = time.perf_counter() - began
    first = [stream.times_s[0] for stream in streams]
    gaps = [gap for stream in streams for gap in stream.gaps_s]
    return {
        "tokens_per_s": requests * TOKENS / seconds,
        "ttft_p50_ms": percentile_ms(first, 50),
        "ttft_p99_ms": percentile_ms(first, 99),
        "itl_mean_ms": 1000 * statistics.fmean(gaps),
        "itl_p50_ms": percentile_ms(gaps, 50),
        "itl_p99_ms": percentile_ms(gaps, 99),
    }


def percentile_ms(seconds: Sequence[float], percent: int) -> float:
    """The nearest-rank percentile, in milliseconds."""
    ordered = sorted(seconds)
    return 1000 * ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]


async def _ask_all(url: str, clients: int, requests: int) -> list[Stream]:
    numbers = iter(range(requests))
    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(
        timeout=120, limits=limits, trust_env=False, headers=HEADERS
    ) as client:

        async def work() -> list[Stream]:
            return [await _ask(client, url, number) for number in numbers]

        return [
            one for part in await asyncio.gather(*(work() for _ in range(clients))) for one in part
        ]


async def _ask(client: httpx.AsyncClient, url: str, number: int) -> Stream:
    body = {
        "model": MODEL,
        "prompt": f"def function_{number}(argument):\n",
        "max_tokens": TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    began = time.perf_counter()
    times: list[float] = []
    async with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            if event.get("choices"):
                times.append(time.perf_counter() - began)
            elif event.get("usage"):
                assert event["usage"]["completion_tokens"] == TOKENS
    return Stream(tuple(times))


# --- servers ---------------------------------------------------------------------------------


@contextmanager
def bare_server(folder: Path, model: str, llm: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """vLLM's own server with the endpoint's engine arguments: its base URL, its start in s."""
    began = time.perf_counter()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    command += ["--served-model-name", MODEL, "--host", "127.0.0.1", "--port", str(port)]
    for key, value in llm["engine_kwargs"].items():
        option = f"--{key.replace('_', '-')}"
        command += [option] if value is True else [option, str(value)]
    log = (folder / "bare.log").open("w")
    environment = os.environ | llm["runtime_env"]["env_vars"]
    server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + START_TIMEOUT_S
    try:
        while not _answers(url):
            if server.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"the bare server did not start:\n{(folder / 'bare.log').read_text()}")
            time.sleep(0.2)
        yield url, time.perf_counter() - began
    finally:
        server.terminate()
        server.wait(30)


@contextmanager
def platform(folder: Path, config: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """A cluster with the endpoint deployed: its base URL, and how long the deploy took."""
    file = folder / "llm.yaml"
    file.write_text(yaml.safe_dump(config))
    environment = os.environ | {
        "MANTA_HOME": str(folder / "home"),
        "MANTA_STORAGE": str(folder / "storage"),
    }
    up = _manta(["up", "--ports", "auto", "--json"], environment)
    try:
        began = time.perf_counter()
        _manta(["deploy", str(file)], environment)
        start_s = time.perf_counter() - began
        key = (folder / "home" / "clusters" / "local" / "api_key").read_text().strip()
        HEADERS["Authorization"] = f"Bearer {key}"
        yield json.loads(up)["serve_url"], start_s
    finally:
        _manta(["down", "--yes"], environment)


def _manta(words: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(
        [MANTA, *words], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"manta {' '.join(words)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/v1/models", timeout=5, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def write_model(root: str) -> str:
    """The quickstart's architecture with random weights; returns its folder."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from manta import storage
    from manta.spec import ModelConfig
    from manta.workloads import layout

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE({char: i for i, char in enumerate(["<|end|>", *alphabet])}, [])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, bos_token_id=0, eos_token_id=0, **ModelConfig().model_dump()
    )
    url = layout.model(MODEL, root)
    with tempfile.TemporaryDirectory(prefix="m-") as folder:
        LlamaForCausalLM(config).save_pretrained(folder)
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
        fast.save_pretrained(folder)
        storage.upload(folder, url, {"kind": "model"})
    return url


if __name__ == "__main__":
    main()
