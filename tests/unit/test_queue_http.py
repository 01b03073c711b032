"""The queue over HTTP: keys and roles, the words of the commands; its fuzz is test_queue_fuzz."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from manta import state as states
from manta.jobs import access, http_api, lease, logs, store
from manta.jobs.access import Role
from manta.state import State


@pytest.fixture
def state(tmp_path: Path) -> Iterator[State]:
    opened = states.open_state(f"sqlite:///{tmp_path}/state.db")
    held = lease.acquire(opened)
    assert held is not None
    store.see_cluster(
        opened,
        held,
        "local",
        cluster_id="c",
        storage_url=str(tmp_path),
        status="up",
        resources='{"slot": 0}',
        seen_at=1.0,
    )
    yield opened
    opened.close()


@pytest.fixture
def keys(state: State) -> dict[str, dict[str, str]]:
    """Headers by role; two submitters."""
    names = {"viewer": Role.VIEWER, "ann": Role.SUBMITTER, "bob": Role.SUBMITTER}
    names |= {"root": Role.ADMIN}
    return {
        name: {"Authorization": f"Bearer {access.add(state, name, role, 'test')}"}
        for name, role in names.items()
    }


@pytest.fixture
def client(state: State) -> TestClient:
    return TestClient(http_api.app(state))


JOB = {"id": "a", "entrypoint": "true"}


def test_nothing_but_the_health_check_answers_without_a_valid_key(client: TestClient) -> None:
    assert client.get("/healthz").json() == {"status": "ok"}
    for headers in ({}, {"Authorization": "Bearer manta_wrong"}, {"Authorization": "Basic x"}):
        answer = client.get("/api/v1/jobs", headers=headers)
        assert (answer.status_code, answer.json()["error"]) == (401, "no valid key")


def test_a_withdrawn_key_is_refused_at_once(
    client: TestClient, state: State, keys: dict[str, Any]
) -> None:
    assert client.get("/api/v1/jobs", headers=keys["viewer"]).status_code == 200
    access.remove(state, "viewer", "test")
    assert client.get("/api/v1/jobs", headers=keys["viewer"]).status_code == 401


def test_each_role_may_do_what_it_is_for(client: TestClient, keys: dict[str, Any]) -> None:
    assert client.post("/api/v1/jobs", json=JOB, headers=keys["viewer"]).status_code == 403
    assert client.post("/api/v1/jobs", json=JOB, headers=keys["ann"]).status_code == 200
    others = client.post("/api/v1/jobs/a/stop", headers=keys["bob"])
    assert (others.status_code, others.json()["error"]) == (403, "job a is ann's")
    quota = {"weight": 2, "limits": {"GPU": 8}}
    assert client.put("/api/v1/quotas/team/ml", json=quota, headers=keys["ann"]).status_code == 403
    assert (
        client.put("/api/v1/quotas/team/ml", json=quota, headers=keys["root"]).status_code == 200
    )
    assert client.get("/api/v1/quotas", headers=keys["viewer"]).json()["teams"]["ml"] == quota
    stopped = client.post("/api/v1/jobs/a/stop", headers=keys["root"])
    assert stopped.json()["state"] == "STOPPED"
    assert client.post("/api/v1/jobs/a/retry", headers=keys["ann"]).json()["state"] == "QUEUED"


def test_the_same_submission_again_is_the_same_job(
    client: TestClient, keys: dict[str, Any]
) -> None:
    new = [client.post("/api/v1/jobs", json=JOB, headers=keys["ann"]).json()["new"] for _ in "123"]
    assert new == [True, False, False]


def test_errors_have_the_words_of_the_commands_and_change_nothing(
    client: TestClient, state: State, keys: dict[str, Any]
) -> None:
    client.post("/api/v1/jobs", json=JOB, headers=keys["ann"])
    before = client.get("/api/v1/events", headers=keys["ann"]).json()
    headers = keys["ann"] | {"Content-Type": "application/json"}
    deep: dict[str, Any] = {}
    for _ in range(60):
        deep = {"a": deep}
    bad = [
        (JOB | {"entrypoint": "false"}, 409, "job id a belongs to `true`"),
        (JOB | {"id": "x-attempt-2"}, 400, "`x-attempt-2` cannot be a job's id"),
        (JOB | {"id": "b", "cluster": "nowhere"}, 400, "no cluster `nowhere` is up"),
        (JOB | {"id": "b", "entrypont": "x"}, 422, "body.entrypont: Extra inputs"),
        (JOB | {"id": "b", "runtime_env": {"working_dir": "/x"}}, 400, "names a local path"),
        (JOB | {"id": "b", "runtime_env": {"a": ["\x00"]}}, 422, "a text contains U+0000"),
        (JOB | {"id": "b", "entrypoint": "\ud800"}, 422, "a text contains half a character"),
        (JOB | {"id": "b", "runtime_env": deep}, 422, "more than 50 lists and objects"),
    ]
    for body, status, words in bad:
        answer = client.post("/api/v1/jobs", content=json.dumps(body), headers=headers)
        assert answer.status_code == status, answer.text
        assert words in answer.json()["error"]
    unknown = client.get("/api/v1/jobs/none", headers=keys["ann"])
    assert (unknown.status_code, unknown.json()["error"]) == (404, "no job none")
    assert client.get("/api/v1/events", headers=keys["ann"]).json() == before


def test_jobs_why_log_and_events_tell_what_the_commands_tell(
    client: TestClient, state: State, keys: dict[str, Any], tmp_path: Path
) -> None:
    client.post("/api/v1/jobs", json=JOB, headers=keys["ann"])
    why = client.get("/api/v1/jobs/a/why", headers=keys["viewer"]).json()
    assert why["why"].startswith("it needs slot: 1; cluster `local` has 0 in all")
    logs.LogWriter(logs.folder(str(tmp_path), "a", 1)).append("häll\n".encode())
    log = client.get("/api/v1/jobs/a/log?attempt=1&offset=1", headers=keys["viewer"])
    assert log.content == "äll\n".encode()
    found = client.get("/api/v1/jobs?states=QUEUED&user=ann", headers=keys["viewer"]).json()
    assert [job["id"] for job in found] == ["a"]
    assert client.get("/api/v1/jobs?states=FAILED", headers=keys["viewer"]).json() == []
    last = client.get("/api/v1/events?job_id=a", headers=keys["viewer"]).json()[-1]
    assert (last["kind"], last["actor"]) == ("submitted", "key:ann@testclient")


def test_a_secret_is_nowhere_in_the_database(state: State, tmp_path: Path) -> None:
    secret = access.add(state, "k", Role.VIEWER, "test")
    assert all(secret.encode() not in file.read_bytes() for file in tmp_path.glob("state.db*"))


def test_prometheus_reads_whether_a_controller_is_at_work_and_jobs_by_state(
    client: TestClient, keys: dict[str, dict[str, str]], state: State
) -> None:
    assert client.get("/metrics").status_code == 401
    client.post("/api/v1/jobs", json=JOB, headers=keys["ann"])
    page = client.get("/metrics", headers=keys["viewer"])
    assert page.headers["content-type"].startswith("text/plain")
    lines = page.text.splitlines()
    assert "manta_queue_controller 1" in lines
    assert 'manta_queue_jobs{state="QUEUED"} 1' in lines
    assert 'manta_queue_jobs{state="FAILED"} 0' in lines
    held = lease.Lease(holder=lease.holder(state) or "", token=1)
    held.release(state)
    assert "manta_queue_controller 0" in client.get("/metrics", headers=keys["viewer"]).text
