"""The durable state of jobs: accepted once, changed one way, by one controller."""

from __future__ import annotations

import re
import shutil
import sqlite3
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from queue_state import request
from sqlalchemy.dialects import postgresql as postgresql_dialect
from sqlalchemy.schema import CreateIndex, CreateTable

from manta import state as states
from manta.errors import InputError
from manta.jobs import audit, policy, queries, store
from manta.jobs import lease as leases
from manta.jobs.lease import Lease, LeaseLost
from manta.jobs.model import Cause, JobState, check_id, submission_id
from manta.jobs.policy import Outcome
from manta.jobs.view import View
from manta.state import State, StateError


def end(state: State, lease: Lease, job_id: str, cause: Cause = Cause.NONE) -> store.Job:
    """Run the job's newest attempt to an end of that cause."""
    job = queries.get(state, job_id)
    attempt = queries.last_attempt(state, job)
    assert attempt is not None
    ended = JobState.FAILED if cause else JobState.SUCCEEDED
    outcome = Outcome(state=ended, cause=cause, message="why")
    verdict = policy.after(
        queries.request_of(state, job_id),
        outcome,
        num_failures=job.num_failures,
        stop_reason=job.stop_reason,
        now=0,
    )
    return store.end_attempt(
        state, lease, job, attempt, outcome, verdict, ended_at=1.0, log_state="complete"
    )


def begin(state: State, lease: Lease, job_id: str) -> store.Attempt:
    job = queries.get(state, job_id)
    return store.begin_attempt(state, lease, job, cluster="local", cluster_id="c1")[1]


def test_fifty_requests_at_once_with_one_id_make_one_job(state: State) -> None:
    barrier = threading.Barrier(50)

    def submit(_: int) -> bool:
        barrier.wait()
        return store.submit(state, request("same"), "ann@here")[1]

    with ThreadPoolExecutor(50) as pool:
        new = list(pool.map(submit, range(50)))
    assert new.count(True) == 1
    assert [job.id for job in queries.listed(state)] == ["same"]
    assert [event.kind for event in queries.events_of(state)] == ["submitted"]


def test_an_id_with_other_content_is_refused_and_nothing_changes(state: State) -> None:
    store.submit(state, request("a"), "ann")
    with pytest.raises(InputError, match="job id a belongs to `true`"):
        store.submit(state, request("a", entrypoint="false"), "ann")
    assert len(queries.events_of(state)) == 1


def test_who_asks_and_how_urgently_does_not_make_it_another_job(state: State) -> None:
    store.submit(state, request("a"), "ann")
    assert not store.submit(state, request("a", user="bob", priority=10), "bob")[1]


@pytest.mark.parametrize("bad", ["", "-x", "a/b", "a b", "x" * 129, "a-attempt-2", "ä", "a\n"])
def test_what_cannot_be_an_id_is_refused(bad: str) -> None:
    with pytest.raises(InputError, match="cannot be a job's id"):
        check_id(bad)


def test_names_of_attempts_never_meet_another_jobs_name() -> None:
    assert submission_id("a", 1) == "a"
    assert submission_id("a", 2) == "a-attempt-2"
    with pytest.raises(InputError):
        check_id(submission_id("a", 2))


def test_each_change_of_state_has_its_event_in_the_same_order(state: State, lease: Lease) -> None:
    store.submit(state, request("a"), "ann")
    begin(state, lease, "a")
    assert end(state, lease, "a", Cause.NODE_LOST).state is JobState.QUEUED
    begin(state, lease, "a")
    assert end(state, lease, "a").state is JobState.SUCCEEDED
    kinds = [event.kind for event in queries.events_of(state, job_id="a")]
    assert kinds == ["submitted", "starting", "requeued", "starting", "succeeded"]
    assert [a.submission_id for a in queries.attempts_of(state, "a")] == ["a", "a-attempt-2"]


def test_of_two_who_begin_an_attempt_on_the_same_sight_one_fails(
    state: State, lease: Lease
) -> None:
    job, _ = store.submit(state, request("a"), "ann")
    store.begin_attempt(state, lease, job, cluster="local", cluster_id="c1")
    with pytest.raises(store.Conflict):
        store.begin_attempt(state, lease, job, cluster="local", cluster_id="c1")
    assert len(queries.attempts_of(state, "a")) == 1


def test_an_attempt_that_has_ended_cannot_end_otherwise(state: State, lease: Lease) -> None:
    store.submit(state, request("a"), "ann")
    begin(state, lease, "a")
    job = queries.get(state, "a")
    attempt = queries.last_attempt(state, job)
    assert attempt is not None
    end(state, lease, "a")
    outcome = Outcome(state=JobState.FAILED, cause=Cause.UNKNOWN, message="")
    verdict = policy.after(request("a"), outcome, num_failures=0, stop_reason="", now=0)
    with pytest.raises(store.Conflict):
        store.end_attempt(
            state, lease, job, attempt, outcome, verdict, ended_at=2.0, log_state="cut"
        )
    assert queries.get(state, "a").state is JobState.SUCCEEDED


def test_a_second_controller_waits_and_takes_over_when_the_lease_expires(state: State) -> None:
    first = leases.acquire(state)
    assert first is not None
    assert leases.acquire(state) is None
    _expire(state)
    second = leases.acquire(state)
    assert second is not None
    assert second.token == first.token + 1
    with pytest.raises(LeaseLost):
        first.renew(state)
    second.renew(state)


def test_a_view_whose_reading_failed_has_lost_nothing_when_it_reads_again(state: State) -> None:
    def fail(*arguments: Any) -> None:
        if "FROM jobs" in arguments[2]:
            raise sa.exc.OperationalError("read", {}, Exception("the database went away"))

    store.submit(state, request("before"), "test")
    view = View(state)
    for job_id in ("at its first reading", "after it"):
        sa.event.listen(state.engine, "before_cursor_execute", fail)
        with pytest.raises(StateError):
            view.refresh()
        sa.event.remove(state.engine, "before_cursor_execute", fail)
        store.submit(state, request(job_id.replace(" ", "-")), "test")
        view.refresh()
        store.submit(state, request(f"{job_id[:2]}-unseen"), "test")
    view.refresh()
    names = ["before", "at-its-first-reading", "at-unseen", "after-it", "af-unseen"]
    assert sorted(job.id for job in view.waiting) == sorted(names)


def test_who_lost_the_lease_can_write_nothing(state: State, lease: Lease) -> None:
    store.submit(state, request("a"), "ann")
    _expire(state)
    assert leases.acquire(state) is not None
    with pytest.raises(LeaseLost):
        begin(state, lease, "a")
    assert queries.get(state, "a").state is JobState.QUEUED
    assert queries.attempts_of(state, "a") == []


def test_a_lease_whose_holder_on_this_machine_is_dead_is_free_at_once(state: State) -> None:
    assert leases.acquire(state) is not None
    with state.write() as connection:
        host = leases._host()
        dead = f"{host} 4194300 1.00"  # above every pid
        connection.execute(states.leases.update().values(holder=dead))
    assert leases.holder(state) is None
    assert leases.acquire(state) is not None


def _expire(state: State) -> None:
    with state.write() as connection:
        connection.execute(states.leases.update().values(expires_at=0.0))


def test_stopping_a_waiting_job_ends_it_and_again_changes_nothing(state: State) -> None:
    store.submit(state, request("a"), "ann")
    assert store.ask_stop(state, "a", "bob", "no use").state is JobState.STOPPED
    assert store.ask_stop(state, "a", "bob", "again").state is JobState.STOPPED
    assert [event.kind for event in queries.events_of(state)] == ["submitted", "stopped"]


def test_a_job_that_failed_can_be_retried_and_one_that_runs_cannot(
    state: State, lease: Lease
) -> None:
    store.submit(state, request("a"), "ann")
    begin(state, lease, "a")
    with pytest.raises(InputError, match="job a is STARTING"):
        store.retry(state, "a", "ann")
    assert end(state, lease, "a", Cause.USER_ERROR).state is JobState.FAILED
    assert store.retry(state, "a", "ann").state is JobState.QUEUED
    assert begin(state, lease, "a").submission_id == "a-attempt-2"


def test_after_running_out_of_memory_the_next_attempt_gets_the_larger_shape(
    state: State, lease: Lease
) -> None:
    larger = [{"memory_bytes": 10}, {"memory_bytes": 20}]
    store.submit(state, request("a", retry={"larger": larger, "max_retries": 5}), "ann")
    given = []
    for cause in (Cause.OUT_OF_MEMORY, Cause.NODE_LOST, Cause.OUT_OF_MEMORY, Cause.OUT_OF_MEMORY):
        given.append(begin(state, lease, "a").resources)
        end(state, lease, "a", cause)
    sizes = [int(text.split('"memory_bytes":')[1].split(",")[0]) for text in given]
    assert sizes == [0, 10, 10, 20]


def test_the_controllers_view_follows_what_others_write(state: State, lease: Lease) -> None:
    view = View(state)
    view.refresh()
    job, _ = store.submit(state, request("a"), "ann")
    view.refresh()
    assert [waiting.id for waiting in view.waiting] == ["a"]
    job, attempt = store.begin_attempt(state, lease, job, cluster="local", cluster_id="c1")
    view.refresh()
    assert (len(view.waiting), view.attempt(view.active["a"]).started_at) == (0, None)
    store.mark_running(state, lease, job, attempt, at=5.0, node_id="n")
    view.refresh()
    assert view.attempt(view.active["a"]).started_at == 5.0, "time-outs count from it"
    end(state, lease, "a", Cause.NODE_LOST)
    view.refresh()
    assert (len(view.waiting), len(view.active)) == (1, 0)
    store.ask_stop(state, "a", "ann", "enough")
    view.refresh()
    assert (len(view.waiting), len(view.active)) == (0, 0)


def test_a_state_of_another_schema_version_is_refused_in_one_line(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/state.db"
    states.open_state(url).close()
    with sqlite3.connect(tmp_path / "state.db") as connection:
        connection.execute("UPDATE manta_meta SET value = '99'")
    with pytest.raises(InputError, match=r"^the state has schema version 99, .*; update Manta$"):
        states.open_state(url)


@pytest.mark.parametrize("url", ["nonsense://x", "sqlite", "::", "postgresql+nodriver://h/d"])
def test_a_url_that_is_none_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(InputError, match="is not a database URL"):
        states.open_state(url)


def test_the_sqlite_file_is_for_its_owner_only(tmp_path: Path) -> None:
    states.open_state(f"sqlite:///{tmp_path}/deep/state.db").close()
    assert (tmp_path / "deep" / "state.db").stat().st_mode & 0o777 == 0o600


def test_the_tables_can_be_made_on_a_real_postgresql_server(server: str) -> None:
    """With the server's own client, which needs no driver."""
    if shutil.which("psql") is None:
        pytest.skip("no psql on this machine")
    dialect = postgresql_dialect.dialect()
    made = [CreateTable(t).compile(dialect=dialect) for t in states.metadata.sorted_tables]
    indexes = [i for t in states.metadata.sorted_tables for i in t.indexes]
    made += [CreateIndex(i).compile(dialect=dialect) for i in indexes]
    script = "BEGIN; " + "; ".join(map(str, made))
    script += f"; SELECT pg_advisory_xact_lock({states._ADVISORY_LOCK}); ROLLBACK;"
    words = ["psql", "-h", server, "-U", "manta", "-d", "postgres", "-v", "ON_ERROR_STOP=1"]
    done = subprocess.run(words, input=script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("CREATE TABLE") == len(states.metadata.tables)


def test_nobody_changes_or_removes_what_happened(state: State) -> None:
    store.submit(state, request("a"), "ann")
    for change in (states.events.update().values(text="nothing"), states.events.delete()):
        refused = pytest.raises((StateError, sa.exc.IntegrityError), match="append-only")
        with refused, state.write() as connection:
            connection.execute(change)
    assert [event.text for event in queries.events_of(state)] == ["true"]


def test_what_was_done_beside_jobs_is_in_the_same_history(state: State) -> None:
    audit.note(state, "cluster up", "gpu: cluster/onprem.yaml", cluster="gpu")
    (event,) = queries.events_of(state)
    assert (event.kind, event.cluster, event.job_id) == ("cluster up", "gpu", "")
    assert "@" in event.actor


def test_the_queries_of_the_operators_page_work(state: State) -> None:
    if state.engine.dialect.name != "postgresql":
        pytest.skip("they are written for PostgreSQL")
    text = (Path(__file__).parents[2] / "docs" / "operator.md").read_text()
    queries_ = re.findall(r"^    (SELECT .*);$", text, re.MULTILINE)
    assert len(queries_) == 3
    with state.read() as connection:
        for query in queries_:
            connection.exec_driver_sql(query)
