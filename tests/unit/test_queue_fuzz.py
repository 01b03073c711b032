"""The HTTP API under thousands of requests made from its own document, on both databases.

MANTA_FUZZ_REQUESTS=20000 MANTA_FUZZ_SEED=7 pytest -s tests/unit/test_queue_fuzz.py
"""

from __future__ import annotations

import os
import random
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from openapi_fuzz import Maker
from queue_state import request

from manta.jobs import access, http_api, passes, queries, store
from manta.jobs.access import Role
from manta.jobs.lease import Lease
from manta.jobs.line import Line
from manta.jobs.view import View
from manta.state import State

NUM_REQUESTS = int(os.environ.get("MANTA_FUZZ_REQUESTS", "2000"))
SEED = int(os.environ.get("MANTA_FUZZ_SEED", "1"))


@pytest.fixture
def client(state: State, lease: Lease, tmp_path: Path) -> TestClient:
    facts = {
        "cluster_id": "c",
        "status": "up",
        "seen_at": 1.0,
        "resources": '{"CPU": 4, "slot": 2}',
    }
    store.see_cluster(state, lease, "local", storage_url=str(tmp_path), **facts)  # type: ignore[arg-type]
    for number in range(4):
        asked = request(f"known{number}", storage_url=str(tmp_path), user="submitter")
        job, _ = store.submit(state, asked, "test")
    store.begin_attempt(state, lease, job, cluster="local", cluster_id="c")
    return TestClient(http_api.app(state), raise_server_exceptions=False)


def test_no_request_made_from_the_document_gets_a_5xx(state: State, client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    maker = Maker(document, random.Random(SEED), _known(), _headers(state))
    answers: dict[str, Counter[int]] = defaultdict(Counter)
    faults: list[str] = []
    for number in range(NUM_REQUESTS):
        call = maker.call()
        headers = {name: text.encode("latin-1") for name, text in call.headers.items()}
        answer = client.request(call.method, call.url, headers=headers, content=call.content)
        answers[call.operation][answer.status_code] += 1
        if answer.status_code >= 500:
            faults.append(f"request {number}: {call}: {answer.status_code} {answer.text[:300]}")
        elif answer.status_code >= 400:
            assert set(answer.json()) & {"error", "detail"}, answer.text
    print(f"\n{NUM_REQUESTS} requests on {state.engine.dialect.name}, seed {SEED}")
    for operation, statuses in sorted(answers.items()):
        print(f"  {operation:45} {dict(sorted(statuses.items()))}")
    assert faults == [], f"{len(faults)} with seed {SEED}"
    names = {f"{method} {path}" for path, method, _ in maker.operations}
    assert answers.keys() == names, "every operation was asked"
    assert [name for name in names if not answers[name][200]] == [], "and did what it is for"
    _the_queue_can_still_be_worked_on(state)


def _the_queue_can_still_be_worked_on(state: State) -> None:
    """What was accepted is read by the controller as well."""
    view = View(state)
    view.refresh()
    line = Line(queries.waiting(state))
    for job in queries.listed(state):
        queries.request_of(state, job.id)
    passes.as_written(state, line, list(view.active.values()))


def _known() -> dict[str, list[str]]:
    return {
        "job_id": ["known0", "known1", "known2", "known3"],
        "kind": ["team", "user"],
        "name": ["ml", "ann"],
        "team": ["ml", "default"],
        "cluster": ["local"],
    }


def _headers(state: State) -> list[dict[str, str]]:
    """Of each role, and of nobody."""
    good = [
        {"Authorization": f"Bearer {access.add(state, role.name.lower(), role, 'test')}"}
        for role in (Role.VIEWER, Role.SUBMITTER, Role.ADMIN)
    ]
    return (
        good
        + good[1:] * 2
        + good[2:] * 4
        + [{}, {"Authorization": "Bearer \u00e4"}, {"Authorization": "x" * 5000}]
    )
