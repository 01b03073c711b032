"""The platform's endpoint beside the bare vLLM server.

Both serve the same small model with the same engine arguments, one after the other alone on the
machine, and are asked by `vllm bench serve` (bench/load.py): streamed completions of TOKENS
tokens; closed loop from 1, 16 and 64 clients; open loop at 50 and 90 % of the requests/s that the
first bare server reached from 64. Before that a cold start: from starting the bare server, or
from the request to an application with no replica, to the first token.

    python bench/serving.py [--json FILE] [--repetitions N]

The endpoint is `serve_apps/llm.yaml`, held at one replica, on a cluster of `manta up`, with an
API key that has limits. Its fast path is on; RAY_SERVE_ENABLE_HA_PROXY=0, its companions, and
MANTA_ENGINE_CORES=all in the environment switch parts of it off, to compare.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml
from common import machine, table, write_json

PROJECT = Path(__file__).parents[1]
MANTA = str(Path(sys.executable).with_name("manta"))
MODEL, TOKENS = "bench", 64
CLIENTS = {1: 24, 16: 128, 64: 256}
"""Clients of a closed loop → requests over all of them."""
SHARES, OPEN_REQUESTS = (0.5, 0.9), 128
"""Loads of an open loop, as parts of the capacity, and the requests of each."""
START_TIMEOUT_S = 600
NICENESS = 15
"""What Ray adds to the niceness of its workers. Load generator and bare server must have the same,
and sessions of their own as Ray's processes do, since Linux shares the cores among sessions."""
FIGURES = ("tokens_per_s", "ttft_p50_ms", "ttft_p99_ms", "itl_mean_ms", "itl_p99_ms")
SWITCHES = (
    "RAY_SERVE_ENABLE_HA_PROXY",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED",
    "RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING",
    "MANTA_ENGINE_CORES",
)


@dataclass(frozen=True)
class Server:
    """One that answers."""

    url: str
    cold_s: float
    """From nothing to the first token."""
    key: str = ""


def main() -> None:
    """Measure both, alternately, and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--repetitions", type=int, default=3)
    args = parser.parse_args()
    result = measure(args.repetitions)
    print(table(summary(result)))
    for key, value in result.items():
        if key.startswith(("ratio", "added")):
            print(f"{key} {value:.3f}")
    if args.json:
        write_json(args.json, result)


def measure(repetitions: int) -> dict[str, Any]:
    """Every repetition, and medians of the ratios, endpoint over bare server."""
    runs: list[dict[str, Any]] = []
    starts: list[dict[str, float]] = []
    capacity = None
    with tempfile.TemporaryDirectory(prefix="m-") as name:
        folder = Path(name)
        config = yaml.safe_load((PROJECT / "serve_apps" / "llm.yaml").read_text())
        llm = config["applications"][0]["args"]["llm_configs"][0]
        llm["model_loading_config"] = {"model_id": MODEL, "model_source": MODEL}
        # One engine on each side: a second, starting on the same cores, would be measured too.
        llm["deployment_config"]["autoscaling_config"] |= {"min_replicas": 0, "max_replicas": 1}
        model = write_model(str(folder / "storage"))
        for _ in range(repetitions):
            with bare_server(folder, model, llm) as bare:
                bare_figures, capacity = ask(folder, bare, model, capacity)
            with platform(folder, config) as endpoint:
                figures, _ = ask(folder, endpoint, model, capacity)
            starts.append({"bare": bare.cold_s, "endpoint": endpoint.cold_s})
            for load, found in bare_figures.items():
                runs.append({"load": load, "bare": found, "endpoint": figures[load]})
    return {
        "machine": machine(),
        "switches": {name: os.environ[name] for name in SWITCHES if name in os.environ},
        "tokens_per_request": TOKENS,
        "capacity_requests_per_s": capacity,
        "cold_s": starts,
        "repetitions": runs,
        **ratios(runs),
        "ratio_cold": statistics.median(s["endpoint"] / s["bare"] for s in starts),
    }


def ratios(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Medians over repetitions: the endpoint's figures by the bare server's, and added TTFT."""
    found = {}
    for load in dict.fromkeys(run["load"] for run in runs):
        pairs = [(run["endpoint"], run["bare"]) for run in runs if run["load"] == load]
        # The mean gap, not its median: a front end that sends tokens in bunches has a median of 0.
        for key in ("tokens_per_s", "ttft_p50_ms", "itl_mean_ms"):
            values = [endpoint[key] / bare[key] for endpoint, bare in pairs]
            found[f"ratio_{key}_{load}"] = statistics.median(values)
        more = [endpoint["ttft_p50_ms"] - bare["ttft_p50_ms"] for endpoint, bare in pairs]
        found[f"added_ttft_p50_ms_{load}"] = statistics.median(more)
    return found


def summary(result: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each load and server: medians over the repetitions."""
    rows = []
    for load in dict.fromkeys(run["load"] for run in result["repetitions"]):
        for server in ("bare", "endpoint"):
            figures = [run[server] for run in result["repetitions"] if run["load"] == load]
            medians = {key: statistics.median(f[key] for f in figures) for key in FIGURES}
            rounded = {key: f"{value:.1f}" for key, value in medians.items()}
            rows.append({"load": load, "server": server, **rounded})
    return rows


# --- load ------------------------------------------------------------------------------------


def ask(
    folder: Path, server: Server, model: str, capacity: float | None
) -> tuple[dict[str, dict[str, float]], float]:
    """All loads on a server that is up: figures by load, and the requests/s of the open loops.

    Args:
        capacity: requests/s of the open loop at its whole; None takes what 64 clients reach here.
    """
    closed: list[dict[str, float]] = [
        {"requests": n, "clients": clients} for clients, n in CLIENTS.items()
    ]
    warm, *found = _bench_serve(folder, server, model, [{"requests": 32, "clients": 16}, *closed])
    assert warm["completed"] == 32
    capacity = capacity or found[-1]["tokens_per_s"] / TOKENS
    rates = [{"requests": OPEN_REQUESTS, "requests_per_s": capacity * s} for s in SHARES]
    found += _bench_serve(folder, server, model, rates)
    names = [f"{clients}_clients" for clients in CLIENTS]
    names += [f"{share:.0%}_load" for share in SHARES]
    return dict(zip(names, found, strict=True)), capacity


def _bench_serve(
    folder: Path, server: Server, model: str, loads: list[dict[str, float]]
) -> list[dict[str, float]]:
    prompts = folder / "prompts.jsonl"
    lines = [json.dumps({"prompt": f"def function_{n}(argument):\n"}) for n in range(512)]
    prompts.write_text("\n".join(lines))
    wanted = {"base_url": server.url, "model": MODEL, "tokenizer": model, "prompts": str(prompts)}
    environment = {name: value for name, value in os.environ.items() if name != "OPENAI_API_KEY"}
    done = subprocess.run(
        ["nice", "-n", str(NICENESS), sys.executable, str(PROJECT / "bench" / "load.py")],
        input=json.dumps(wanted | {"tokens": TOKENS, "loads": loads}),
        env=environment | ({"OPENAI_API_KEY": server.key} if server.key else {}),
        capture_output=True,
        text=True,
        start_new_session=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"the load generator failed:\n{done.stdout}{done.stderr}")
    results = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return [json.loads(line.removeprefix("RESULT ")) for line in results]


def first_token(url: str, key: str = "") -> None:
    """Ask until a first token comes, as a client does whose server may not be there yet."""
    body = {"model": MODEL, "prompt": "def", "max_tokens": 4, "ignore_eos": True, "stream": True}
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        with (
            contextlib.suppress(httpx.TransportError),
            httpx.stream(
                "POST",
                f"{url}/v1/completions",
                json=body,
                headers=headers,
                timeout=START_TIMEOUT_S,
                trust_env=False,
            ) as answer,
        ):
            if answer.status_code == 200:
                assert next(answer.iter_lines()).startswith("data: {")
                return
        time.sleep(0.1)
    sys.exit(f"{url} gave no token")


# --- servers ---------------------------------------------------------------------------------


@contextmanager
def bare_server(folder: Path, model: str, llm: dict[str, Any]) -> Iterator[Server]:
    """vLLM's own server with the endpoint's engine arguments."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["nice", "-n", str(NICENESS), sys.executable]
    command += ["-m", "vllm.entrypoints.openai.api_server", "--model", model]
    command += ["--served-model-name", MODEL, "--host", "127.0.0.1", "--port", str(port)]
    for key, value in llm["engine_kwargs"].items():
        option = f"--{key.replace('_', '-')}"
        command += [option] if value is True else [option, str(value)]
    environment = os.environ | llm["runtime_env"]["env_vars"]
    began = time.perf_counter()
    with (folder / "bare.log").open("w") as log:
        server = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    try:
        first_token(url)
        yield Server(url, time.perf_counter() - began)
    finally:
        server.terminate()
        server.wait(30)


@contextmanager
def platform(folder: Path, config: dict[str, Any]) -> Iterator[Server]:
    """A cluster with the endpoint deployed, first without a replica, then with one."""
    file = folder / "llm.yaml"
    file.write_text(yaml.safe_dump(config))
    environment = os.environ | {
        "MANTA_HOME": str(folder / "home"),
        "MANTA_STORAGE": str(folder / "storage"),
    }
    url = json.loads(manta(["up", "--ports", "auto", "--json"], environment))["serve_url"]
    try:
        manta(["deploy", str(file)], environment)
        limits = ["--requests-per-min", "100000", "--tokens-per-min", "100000000"]
        words = ["keys", "make", f"bench-{time.time_ns()}", *limits, "--json"]
        key = json.loads(manta(words, environment))["secret"]
        time.sleep(3)  # until every replica knows the key
        began = time.perf_counter()
        first_token(url, key)
        yield Server(url, time.perf_counter() - began, key)
    finally:
        manta(["down", "--yes"], environment)


def manta(words: list[str], environment: dict[str, str]) -> str:
    """What a command prints; ends the benchmark if it fails."""
    done = subprocess.run(
        [MANTA, *words], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"manta {' '.join(words)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


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
