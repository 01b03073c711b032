"""Load on an OpenAI endpoint by vLLM's own generator, `vllm bench serve`, in a process of its own.

Reads one JSON object from standard input:

    {"base_url": …, "model": …, "tokenizer": FOLDER, "prompts": FILE.jsonl, "tokens": 64,
     "loads": [{"requests": 96, "clients": 16}, {"requests": 60, "requests_per_s": 2.5}]}

and prints after each load a line `RESULT {…}` with what the generator found. `clients` is a closed
loop: each sends its next request when the last is answered. `requests_per_s` is an open one,
with Poisson arrivals. A key is taken from $OPENAI_API_KEY.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from typing import Any

KEPT = {
    "output_throughput": "tokens_per_s",
    "median_ttft_ms": "ttft_p50_ms",
    "p99_ttft_ms": "ttft_p99_ms",
    "mean_itl_ms": "itl_mean_ms",
    "median_itl_ms": "itl_p50_ms",
    "p99_itl_ms": "itl_p99_ms",
    "completed": "completed",
    "failed": "failed",
    "duration": "seconds",
}


def main() -> None:
    """Put each load on the endpoint, one after the other."""
    from vllm.benchmarks.serve import add_cli_args
    from vllm.benchmarks.serve import main as bench_serve
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    wanted = json.load(sys.stdin)
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    for load in wanted["loads"]:
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            found = bench_serve(parser.parse_args(arguments(wanted, load)))
        assert found["failed"] == 0, said.getvalue()
        assert found["total_output_tokens"] == load["requests"] * wanted["tokens"]
        print("RESULT", json.dumps({ours: found[theirs] for theirs, ours in KEPT.items()}))


def arguments(wanted: dict[str, Any], load: dict[str, Any]) -> list[str]:
    """The words of `vllm bench serve` for one load."""
    words = ["--backend", "openai", "--endpoint", "/v1/completions"]
    words += ["--base-url", wanted["base_url"], "--model", wanted["model"]]
    words += ["--served-model-name", wanted["model"], "--tokenizer", wanted["tokenizer"]]
    words += ["--dataset-name", "custom", "--dataset-path", wanted["prompts"]]
    words += ["--skip-chat-template", "--disable-shuffle"]
    words += ["--custom-output-len", str(wanted["tokens"]), "--ignore-eos", "--temperature", "0"]
    words += ["--num-prompts", str(load["requests"]), "--disable-tqdm"]
    words += ["--ready-check-timeout-sec", "0", "--percentile-metrics", "ttft,itl"]
    if "clients" in load:
        return [*words, "--max-concurrency", str(load["clients"])]
    return [*words, "--request-rate", str(load["requests_per_s"]), "--seed", "1"]


if __name__ == "__main__":
    main()
