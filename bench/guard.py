"""What the guard adds to a request: an application of nothing, with it and without it.

In one process and without a network, so that what is measured is the guard alone: a short chat
completion, and a stream of 64 events. Cases alternate; each figure is the median over the
repetitions of the mean over REQUESTS requests, one after the other, in CPU time, which other
work on the machine hardly changes.

    python bench/guard.py [--json FILE] [--repetitions N]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

from common import machine, table, write_json

from manta.serving.access import key_store, keys
from manta.serving.access.usage import Ledger
from manta.serving.guard.guard import App, Guard
from manta.serving.guard.limiter import LocalLimiter
from manta.serving.telemetry.metrics import Ray
from manta.serving.telemetry.observer import Observer
from manta.spec.guard import GuardConfig, Limits

REQUESTS, EVENTS = 1000, 64
USAGE = {"prompt_tokens": 20, "completion_tokens": EVENTS, "total_tokens": 20 + EVENTS}
ANSWER = json.dumps({"choices": [{"text": "a " * EVENTS}], "usage": USAGE}).encode()
EVENT = b"data: " + json.dumps({"id": "x" * 40, "choices": [{"text": "a"}]}).encode() + b"\n\n"
LAST = b"data: " + json.dumps({"choices": [], "usage": USAGE}).encode() + b"\n\n"


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--repetitions", type=int, default=5)
    args = parser.parse_args()
    result = asyncio.run(measure(args.repetitions))
    print(table(result["cases"]))
    for key, value in result.items():
        if key.startswith("ratio"):
            print(f"{key} {value:.1f}")
    if args.json:
        write_json(args.json, result)


async def measure(repetitions: int) -> dict[str, Any]:
    """Every repetition, in microseconds a request, and the medians."""
    with tempfile.TemporaryDirectory(prefix="m-") as root:
        observer = Observer(Ray())
        guard = Guard(
            nothing,
            GuardConfig(),
            key_store.KeyTable(root),
            LocalLimiter("bench"),
            Ledger(root, {}),
            observer=observer,
        )
        free, limited = (
            make_key(root),
            make_key(root, tokens_per_min=10**9, requests_per_min=10**9),
        )
        cases: dict[str, Callable[[], Any]] = {}
        for stream in (False, True):
            kind = "stream" if stream else "answer"
            cases[f"{kind}, bare"] = asker(nothing, free, stream)
            cases[f"{kind}, key"] = asker(guard, free, stream)
            cases[f"{kind}, key with limits"] = asker(guard, limited, stream)
        cases["refused: no key"] = asker(guard, "", False)
        runs = [
            {name: await timed(case) for name, case in cases.items()} for _ in range(repetitions)
        ]
        tells = [await telling(observer, cases["stream, key"]) for _ in range(repetitions)]
        await guard.stop()
    medians = {name: statistics.median(run[name] for run in runs) for name in cases}
    medians["metrics of one key and model, told every 5 s"] = statistics.median(tells)
    rows = [{"case": name, "us": f"{us:.0f}"} for name, us in medians.items()]
    ratios = {
        f"ratio_{kind}": medians[f"{kind}, key"] / medians[f"{kind}, bare"]
        for kind in ("answer", "stream")
    }
    return {
        "machine": machine(),
        "requests": REQUESTS,
        "repetitions": runs,
        "telling": tells,
        "cases": rows,
        **ratios,
    }


def make_key(root: str, **limits: int) -> str:
    """A stored key's secret."""
    key, secret = keys.make(name="a", owner="bench", now=time.time(), limits=Limits(**limits))
    key_store.save(root, key)
    return secret


async def timed(case: Callable[[], Any]) -> float:
    """Microseconds of CPU a request."""
    began = time.process_time()
    for _ in range(REQUESTS):
        await case()
    return 1e6 * (time.process_time() - began) / REQUESTS


async def telling(observer: Observer, case: Callable[[], Any]) -> float:
    """Microseconds of CPU to tell Ray what is new; in a replica its agent has it from there."""
    await case()
    began = time.process_time()
    await observer.tell(512)
    return 1e6 * (time.process_time() - began)


def asker(app: App, secret: str, stream: bool) -> Callable[[], Any]:
    """A coroutine function that sends one request to `app`."""
    message = {"role": "user", "content": "Tell me of Ray. " * 20}
    body = {"model": "m", "messages": [message], "max_tokens": EVENTS, "stream": stream}
    data = json.dumps(body).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"authorization", b"Bearer " + secret.encode()),
    ]

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": data}

    async def send(message: Any) -> None:
        pass

    async def one() -> None:
        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions"}
        await app({**scope, "headers": headers}, receive, send)

    return one


async def nothing(scope: Any, receive: Any, send: Any) -> None:
    """An application that reads the request and has its answer ready."""
    body = json.loads((await receive())["body"])
    kind = b"text/event-stream" if body["stream"] else b"application/json"
    headers = [(b"content-type", kind)]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for _ in range(EVENTS if body["stream"] else 0):
        await send({"type": "http.response.body", "body": EVENT, "more_body": True})
    await send({"type": "http.response.body", "body": LAST if body["stream"] else ANSWER})


if __name__ == "__main__":
    main()
