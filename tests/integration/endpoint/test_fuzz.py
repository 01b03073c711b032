"""Requests that schemathesis makes from the endpoint's own OpenAPI documents: none gets a 5xx.

MANTA_FUZZ_CASES=10000 MANTA_FUZZ_SEED=7 pytest -s tests/integration/endpoint/test_fuzz.py
"""

from __future__ import annotations

import os
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import Case, GenerationMode

from .conftest import Site

pytestmark = pytest.mark.timeout(1800)

NUM_CASES = int(os.environ.get("MANTA_FUZZ_CASES", "2200"))
SEED = int(os.environ.get("MANTA_FUZZ_SEED", "1"))
AT_ONCE = 8
MOST_TOKENS = 8
"""Of an answer, unless the case is about that field: the engine's speed is not what is tested."""
HANGS_S = 60

WEIGHTS = {"/v1/completions": 6, "/v1/chat/completions": 3, "/tokenize": 2, "/detokenize": 2}
"""What users call gets more of the cases than the other routes with a body, which get one."""


@pytest.mark.parametrize(
    ("prefix", "model", "share"), [("", "tiny", 0.8), ("/reader", "reader", 0.2)]
)
def test_no_request_from_the_document_gets_a_5xx_or_hangs(
    known: Site, prefix: str, model: str, share: float
) -> None:
    cases = make(known, prefix, model, round(NUM_CASES * share))
    assert len(cases) >= round(NUM_CASES * share)
    before = started_at(known, prefix)
    answers: dict[str, Counter[int]] = defaultdict(Counter)
    faults: list[str] = []

    def send(mine: list[Case]) -> None:
        with requests.Session() as session:
            for case in mine:
                status, text = ask(case, known.url + prefix, session)
                answers[case.operation.label][status] += 1
                if not 200 <= status < 500:
                    faults.append(
                        f"{case.operation.label} {status} {text[:300]}: {case.body!r:.600}"
                    )

    begun = time.monotonic()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(send, [cases[n::AT_ONCE] for n in range(AT_ONCE)]))
    print(f"\n{len(cases)} requests, seed {SEED}, {time.monotonic() - begun:.0f} s")
    for operation, statuses in sorted(answers.items()):
        print(f"  {operation:40} {dict(sorted(statuses.items()))}")
    assert faults == [], f"{len(faults)} with seed {SEED}"
    assert started_at(known, prefix) == before, "the replica was started anew"
    with known.http(known.user, prefix) as client:
        for _ in range(AT_ONCE):
            asked = {"model": model, "prompt": "a", "input": "a", "max_tokens": 2}
            route = "/v1/embeddings" if prefix else "/v1/completions"
            assert client.post(route, json=asked).status_code == 200


def ask(case: Case, url: str, session: requests.Session) -> tuple[int, str]:
    try:
        answer = case.call(base_url=url, session=session, timeout=HANGS_S)
    except requests.exceptions.RequestException as error:  # cut, or no answer in time
        return 0, repr(error)
    return answer.status_code, answer.text


def make(site: Site, prefix: str, model: str, num_cases: int) -> list[Case]:
    """Cases for every operation: allowed by the document, and not."""
    with site.http(site.admin, prefix) as client:
        document = client.get("/openapi.json").json()
    schema = schemathesis.openapi.from_dict(document)
    operations = [found.ok() for found in schema.get_all_operations()]
    total = sum(weight(operation) for operation in operations)
    cases: list[Case] = []
    for operation in operations:
        wanted = -(-num_cases * weight(operation) // total)
        for mode in GenerationMode.POSITIVE, GenerationMode.NEGATIVE:
            cases += generate(operation, mode, -(-wanted // 2))
    for number, case in enumerate(cases):
        user = case.operation.path in WEIGHTS and number % 2
        case.headers["Authorization"] = f"Bearer {site.user if user else site.admin}"
        case.body = bounded(case.body, model)
    return cases


def weight(operation: Any) -> int:
    has_body = bool(list(operation.body))
    return WEIGHTS.get(operation.path, 1) if has_body else 0


def generate(operation: Any, mode: GenerationMode, num_cases: int) -> list[Case]:
    made: list[Case] = []

    @seed(SEED)
    @settings(
        max_examples=max(1, num_cases),
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
    except Unsatisfiable:  # nothing that could be wrong
        return []
    return made


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


def started_at(site: Site, prefix: str) -> str:
    """When the replica's process began."""
    with site.http(site.admin, prefix) as client:
        lines = client.get("/metrics").text.splitlines()
    (told,) = [line for line in lines if line.startswith("process_start_time_seconds ")]
    return told


HEADERS = {
    "x-request-id": 500,
    "serve_multiplexed_model_id": 500,
    "x-session-id": 500,
    "x-request-disconnect-disabled": 500,
    "x-request-timeout-seconds": 500,
    "traceparent": 200,
    "user-agent": 200,
    "accept": 200,
    "serve-nothing": 200,
}
"""What a value that is not UTF-8 gets. Ray Serve reads five headers before the guard sees the
request, and fails: a fault of Ray 2.60, `_direct_ingress_asgi` in serve/_private/replica.py."""


def test_headers_that_are_no_text_fail_in_ray_alone(known: Site) -> None:
    found = {}
    with known.http(known.user) as client:
        for name in HEADERS:
            answer = client.get("/v1/models", headers=[(name.encode(), b"\xe4")])
            found[name] = answer.status_code
    assert found == HEADERS
