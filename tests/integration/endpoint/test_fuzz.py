"""Requests that schemathesis makes from the endpoint's own OpenAPI documents: none gets a 5xx.

MANTA_FUZZ_CASES=10000 MANTA_FUZZ_SEED=7 pytest -s tests/integration/endpoint/test_fuzz.py
"""

from __future__ import annotations

import itertools
import math
import os
import time
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import httpx
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import Case, GenerationMode

from .conftest import Site, started_at

pytestmark = pytest.mark.timeout(1800)

NUM_CASES = int(os.environ.get("MANTA_FUZZ_CASES", "2200"))
SEED = int(os.environ.get("MANTA_FUZZ_SEED", "1"))
AT_ONCE = 8
NUM_MAKERS = 2
"""Processes: making a request takes longer than answering it."""
MOST_TOKENS = 8
"""Of an answer, unless the case is about that field: the engine's speed is not what is tested."""
HANGS_S = 60

WEIGHTS = {
    "/v1/completions": 12.0,
    "/v1/completions/render": 3.0,
    "/v1/chat/completions": 4.0,
    "/detokenize": 6.0,
    "/inference/v1/generate": 6.0,
}
"""How much more of the cases a route gets than others with a body, which have a quarter of one:
what users call, and what takes little to make."""
PER_FALSE_CASE = 3
"""Cases that the document allows, for each that it does not."""


@dataclass(frozen=True)
class Request:
    """One case, as it goes over the wire."""

    operation: str
    method: str
    path: str
    headers: dict[str, str]
    content: bytes | None


@dataclass(frozen=True)
class Target:
    """One application of the endpoint."""

    prefix: str
    model: str
    num_cases: int


TARGETS = [
    Target("", "tiny", round(NUM_CASES * 0.92)),
    Target("/reader", "reader", NUM_CASES - round(NUM_CASES * 0.92)),
]


@pytest.fixture(scope="module")
def requests_of(known: Site) -> dict[str, list[Request]]:
    """Of each application, made side by side."""
    jobs = []
    for target in TARGETS:
        with known.http(known.admin, target.prefix) as client:
            document = client.get("/openapi.json").json()
        jobs += [(target, document, number) for number in range(NUM_MAKERS)]
    made: dict[str, list[Request]] = defaultdict(list)
    with ProcessPoolExecutor(NUM_MAKERS, get_context("spawn")) as pool:
        for (target, *_), found in zip(
            jobs, pool.map(make, *zip(*jobs, strict=True)), strict=True
        ):
            made[target.prefix] += found
    return made


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.model)
def test_no_request_from_the_document_gets_a_5xx_or_hangs(
    known: Site, requests_of: dict[str, list[Request]], target: Target
) -> None:
    mine = requests_of[target.prefix]
    assert len(mine) >= target.num_cases
    before = started_at(known, target.prefix)
    answers: dict[str, Counter[int]] = defaultdict(Counter)
    faults: list[str] = []

    def send(part: list[Request]) -> None:
        keys = itertools.cycle([known.user, known.admin])
        with httpx.Client(base_url=known.url + target.prefix, timeout=HANGS_S) as client:
            for one in part:
                status, text = ask(client, one, next(keys))
                answers[one.operation][status] += 1
                if not 200 <= status < 500:
                    faults.append(f"{one.operation} {status} {text[:300]}: {one.content!r:.3000}")

    begun = time.monotonic()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(send, [mine[n::AT_ONCE] for n in range(AT_ONCE)]))
    print(f"\n{len(mine)} requests, seed {SEED}, {time.monotonic() - begun:.0f} s")
    for operation, statuses in sorted(answers.items()):
        print(f"  {operation:40} {dict(sorted(statuses.items()))}")
    assert len(faults) == 0, f"{len(faults)} with seed {SEED}:\n" + "\n".join(faults[:20])
    assert started_at(known, target.prefix) == before, "the replica was started anew"
    with known.http(known.user, target.prefix) as client:
        for _ in range(AT_ONCE):
            asked = {"model": target.model, "prompt": "a", "input": "a", "max_tokens": 2}
            route = "/v1/embeddings" if target.prefix else "/v1/completions"
            assert client.post(route, json=asked).status_code == 200


def ask(client: httpx.Client, one: Request, key: str) -> tuple[int, str]:
    headers = {**one.headers, "Authorization": f"Bearer {key}"}
    try:
        answer = client.request(one.method, one.path, headers=headers, content=one.content)
    except httpx.HTTPError as error:  # cut, or no answer in time
        return 0, repr(error)
    return answer.status_code, answer.text


def make(target: Target, document: dict[str, Any], number: int) -> list[Request]:
    """Requests for every operation, allowed by the document and not; one part of `NUM_MAKERS`."""
    schema = schemathesis.openapi.from_dict(document)
    operations = [found.ok() for found in schema.get_all_operations()]
    total = sum(map(weight, operations))
    made: list[Request] = []
    for operation in operations:
        wanted = target.num_cases * weight(operation) / total / NUM_MAKERS
        wrong = math.ceil(wanted / (PER_FALSE_CASE + 1))
        for mode, num_cases in (
            (GenerationMode.POSITIVE, max(1, math.ceil(wanted) - wrong)),
            (GenerationMode.NEGATIVE, max(1, wrong)),
        ):
            cases = generate(operation, mode, num_cases, SEED * NUM_MAKERS + number)
            made += [on_the_wire(case, target.model) for case in cases]
    return made


def weight(operation: Any) -> float:
    return WEIGHTS.get(operation.path, 0.25) if list(operation.body) else 0


def generate(operation: Any, mode: GenerationMode, num_cases: int, number: int) -> list[Case]:
    made: list[Case] = []

    @seed(number)
    @settings(
        max_examples=num_cases,
        phases=[Phase.generate],
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(operation.as_strategy(generation_mode=mode))
    def note(case: Case) -> None:
        made.append(case)

    try:
        note()
    except Unsatisfiable:  # there is nothing that could be wrong
        return []
    return made


def on_the_wire(case: Case, model: str) -> Request:
    case.body = bounded(case.body, model)
    given = requests.Request(**case.as_transport_kwargs(base_url="http://x")).prepare()
    content = given.body.encode() if isinstance(given.body, str) else given.body
    assert given.method is not None
    path = str(given.url).removeprefix("http://x")
    return Request(case.operation.label, given.method, path, dict(given.headers), content)


def bounded(body: Any, model: str) -> Any:
    """For a model that there is, and not much of an answer."""
    if not isinstance(body, dict):
        return body
    changed = {**body, "model": model} if isinstance(body.get("model"), str) else dict(body)
    for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
        value = body.get(name, 0)
        if value is None or (isinstance(value, int) and not MOST_TOKENS >= value > 0):
            changed[name] = MOST_TOKENS if name != "max_output_tokens" else 16
    return changed


HEADERS = (
    "x-request-id",
    "x-session-id",
    "x-request-disconnect-disabled",
    "x-request-timeout-seconds",
    "traceparent",
    "user-agent",
    "accept",
    "serve-nothing",
)
"""Ray Serve reads the first four before the guard sees a request, and fails where they are not
UTF-8; HAProxy takes them out (cluster/haproxy.py)."""


def test_headers_that_are_no_text_harm_nobody(known: Site) -> None:
    found = {}
    with known.http(known.user) as client:
        for name in HEADERS:
            answer = client.get("/v1/models", headers=[(name.encode(), b"\xe4")])
            found[name] = answer.status_code
    assert found == dict.fromkeys(HEADERS, 200)
