"""The web page's files and routes: nothing without a key, nothing from elsewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from queue_state import request

from manta import state as states
from manta.jobs import access, http_api, overview, runs, store, web_page
from manta.jobs import lease as leases
from manta.jobs.access import Role
from manta.jobs.lease import Lease
from manta.jobs.model import JobState
from manta.jobs.overview import Overview
from manta.jobs.run_request import RunRequest, ServeFile, StepRequest
from manta.state import State

FILES = sorted(web_page.FOLDER.iterdir())


@pytest.fixture
def state(tmp_path: Path) -> Iterator[State]:
    opened = states.open_state(f"sqlite:///{tmp_path}/state.db")
    yield opened
    opened.close()


@pytest.fixture
def client(state: State) -> TestClient:
    return TestClient(http_api.app(state))


@pytest.fixture
def key(state: State) -> dict[str, str]:
    return {"Authorization": f"Bearer {access.add(state, 'page', Role.VIEWER, 'test')}"}


def test_every_route_of_the_api_refuses_without_a_key(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    routes = [(p, m) for p, methods in document["paths"].items() for m in methods]
    assert ("/api/v1/waiting", "get") in routes
    for path, method in routes:
        if path == "/healthz":
            continue
        answer = client.request(method, re.sub(r"\{\w+\}", "a", path), json={})
        assert (answer.status_code, answer.json()["error"]) == (401, "no valid key"), path


def test_the_page_needs_no_key_and_is_served_under_a_strict_policy(client: TestClient) -> None:
    for path in ("/", *(f"/web/{file.name}" for file in FILES)):
        answer = client.get(path)
        assert answer.status_code == 200, path
        assert answer.headers["content-security-policy"].startswith("default-src 'self';")
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["x-frame-options"] == "DENY"
        assert answer.headers["cache-control"] == "no-cache"


def test_data_is_never_kept_by_the_browser(client: TestClient, key: dict[str, str]) -> None:
    assert client.get("/api/v1/jobs", headers=key).headers["cache-control"] == "no-store"


def test_only_the_files_of_the_page_are_served(client: TestClient) -> None:
    for path in ("/web/../http_api.py", "/web/%2e%2e/http_api.py", "/web//etc/passwd", "/web/"):
        assert client.get(path).status_code == 404, path


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_nothing_comes_from_elsewhere_and_no_data_becomes_markup(file: Path) -> None:
    text = file.read_text().replace("http://www.w3.org/2000/svg", "")
    assert re.findall(r"https?://|//[a-z]+\.[a-z]", text) == []
    assert re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text) == []
    assert re.findall(r"<script>|<style|\son\w+=|\sstyle=", text) == []


def test_the_request_is_told_without_values_of_variables_and_passwords(state: State) -> None:
    runtime_env: dict[str, Any] = {
        "env_vars": {"TOKEN": "hush", "MODE": "fast"},
        "pip": {"packages": ["git+https://me:hush@host/x"], "env_vars": {"A": "hush"}},
    }
    asked = request("a", runtime_env_passthrough=runtime_env, entrypoint="curl s3://u:hush@h/")
    store.submit(state, asked, "ann")
    told = overview.asked(state, "a")
    assert told["environment"] == ["MODE", "TOKEN"]
    assert "hush" not in str(told)
    assert "fast" not in str(told)
    assert told["runtime_env"]["pip"]["packages"] == ["git+https://…@host/x"]


def test_the_line_is_told_in_its_order_and_follows_the_state(state: State) -> None:
    page = Overview(state)
    assert page.waiting(10) == []
    store.submit(state, request("a"), "ann")
    store.submit(state, request("b", priority=10), "ann")
    assert [wait.id for wait in page.waiting(10)] == ["b", "a"]
    assert "cluster `local`" in page.waiting(1)[0].why
    store.ask_stop(state, "b", "ann", "stopped")
    assert [wait.id for wait in page.waiting(10)] == ["a"]


def test_a_cluster_is_told_with_what_the_queues_jobs_hold(state: State) -> None:
    held = leases.acquire(state)
    assert held is not None
    facts = {"cluster_id": "c", "storage_url": "/x", "status": "up", "seen_at": 1.0}
    store.see_cluster(state, held, "local", resources='{"CPU": 8, "slot": 4}', **facts)  # type: ignore[arg-type]
    for name in ("a", "b"):
        job, _ = store.submit(state, request(name, shape='[["CPU", 3]]'), "ann")
        store.begin_attempt(state, held, job, cluster="local", cluster_id="c")
    cluster = Overview(state).clusters()[0]
    assert (cluster.capacity["CPU"], cluster.held) == (8, {"slot": 2.0, "CPU": 6.0})


def test_a_run_is_told_with_needs_and_the_states_of_its_jobs(state: State, lease: Lease) -> None:
    runs.submit(state, _run(), "ann")
    run = runs.listed(state, 5)[0]
    first, second = run.steps
    assert (first.state, first.job_id) == ("", "r-one")
    assert (second.state, second.job_id, second.needs) == ("", None, ("one",))
    asked = runs.request_of(state, "r", "one").job
    runs.begin_step(state, lease, run, first, asked, "mark")
    assert runs.listed(state, 5)[0].steps[0].state == "QUEUED"
    store.ask_stop(state, "r-one", "ann", "enough")
    assert runs.listed(state, 5)[0].steps[0].state == "STOPPED"
    first, second = runs.listed(state, 5)[0].steps
    runs.settle_step(state, lease, run, first, JobState.SUCCEEDED, job_id="earlier-one")
    runs.settle_step(state, lease, run, second, JobState.SUCCEEDED)
    run = runs.listed(state, 5)[0]
    assert [(step.state, step.job_id) for step in run.steps] == [
        ("SUCCEEDED", "earlier-one"),
        ("SUCCEEDED", None),
    ]
    assert runs.listed(state, 5, before_seq=run.seq) == []


def test_a_run_shows_no_passwords(client: TestClient, state: State, key: dict[str, str]) -> None:
    asked = _run().model_copy(update={"storage_url": "s3://user:hush@host/x"})
    runs.submit(state, asked, "ann")
    held, run = leases.acquire(state), runs.get(state, "r")
    assert held is not None
    made = {"model": "s3://user:hush@host/x/m"}
    runs.settle_step(state, held, run, run.steps[0], JobState.SUCCEEDED, artifacts=made)
    answer = client.get("/api/v1/runs", headers=key)
    assert answer.json()[0]["steps"][0]["artifacts"] == {"model": "s3://…@host/x/m"}
    assert answer.json()[0]["id"] == "r"
    assert "hush" not in answer.text


def test_the_end_of_a_log_is_told_with_where_it_begins(
    client: TestClient, state: State, key: dict[str, str], tmp_path: Path
) -> None:
    from manta.jobs import logs

    store.submit(state, request("a", storage_url=str(tmp_path)), "ann")
    logs.LogWriter(logs.folder(str(tmp_path), "a", 1)).append(b"0123456789")
    answer = client.get("/api/v1/jobs/a/log?attempt=1&tail=4", headers=key)
    assert (answer.text, answer.headers["x-log-offset"]) == ("6789", "6")
    rest = client.get("/api/v1/jobs/a/log?attempt=1&tail=4&offset=9", headers=key)
    assert (rest.text, rest.headers["x-log-offset"]) == ("9", "9")


def test_tables_that_an_earlier_manta_had_not_are_added(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/state.db"
    earlier = states.open_state(url)
    store.submit(earlier, request("a"), "ann")
    with earlier.write() as connection:
        states.pipeline_steps.drop(connection)
    earlier.close()
    now = states.open_state(url)
    runs.submit(now, _run(), "ann")
    assert [run.id for run in runs.listed(now, 5)] == ["r"]
    now.close()


def _run() -> RunRequest:
    serve = ServeFile(name="x.yaml", text="applications: []")
    steps = (
        StepRequest(name="one", job=request("r-one")),
        StepRequest(name="two", deploy=serve, needs=("one",)),
    )
    return RunRequest(id="r", pipeline="p", cluster="local", storage_url="/x", steps=steps)
