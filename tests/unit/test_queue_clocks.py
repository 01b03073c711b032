"""Clocks that are wrong, step, or differ between machines: who may act, and when."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from fake_ray import FakeRay
from queue_state import request

from manta import state as states
from manta.jobs import lease as leases
from manta.jobs import line, ray_api, store
from manta.jobs.books import Waiting
from manta.jobs.lease import Lease
from manta.jobs.steady import Steady
from manta.state import State

HOUR_S = 3600.0


def step_clock(monkeypatch: pytest.MonkeyPatch, ahead_s: float) -> None:
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + ahead_s)


def let_another_machine_hold(state: State, expires_in_s: float) -> None:
    with state.write() as connection:
        told = {"holder": "elsewhere/1 1 1.00", "expires_at": states.clock(connection)}
        told["expires_at"] += expires_in_s
        connection.execute(states.leases.update().values(**told))


@pytest.mark.parametrize(("expires_in_s", "is_free"), [(10, False), (-1, True), (HOUR_S, True)])
def test_a_lease_is_free_when_it_ran_out_or_is_of_a_clock_put_back_since(
    state: State, lease: Lease, expires_in_s: float, is_free: bool
) -> None:
    let_another_machine_hold(state, expires_in_s)
    assert (leases.holder(state) is None) == is_free
    taken = leases.acquire(state)
    assert (taken is not None) == is_free
    if taken is not None:
        assert taken.token == lease.token + 1
        taken.renew(state)


@pytest.mark.parametrize("ahead_s", [HOUR_S, -HOUR_S])
def test_a_server_tells_the_time_for_all_who_use_it(
    state: State, monkeypatch: pytest.MonkeyPatch, ahead_s: float
) -> None:
    if state.engine.dialect.name == "sqlite":
        pytest.skip("a file has no clock: all who use it are on one machine")
    held = leases.acquire(state)
    let_another_machine_hold(state, 10)
    step_clock(monkeypatch, ahead_s)
    assert held is not None
    assert leases.acquire(state) is None
    assert leases.holder(state) == "elsewhere/1 1 1.00"
    job, _ = store.submit(state, request("a", deadline_s=60), "ann")
    assert job.deadline_at is not None
    assert abs(job.deadline_at - 60 - (time.time() - ahead_s)) < 30


def test_a_pause_that_a_step_made_longer_than_any_is_over() -> None:
    def waiting(job_id: str, not_before: float) -> Waiting:
        values = dict.fromkeys(Waiting._fields, "") | {"id": job_id, "not_before": not_before}
        values |= {"seq": 1, "priority": 0, "deadline_at": None}
        return Waiting(**values)

    kept = line.Line([waiting("old", 5000.0 + HOUR_S), waiting("new", 5000.0 + 100)])
    assert kept.groups(5000.0) == {}, "the newer one comes first and is of the clock as it is"
    ready = [job for group in kept.groups(5101.0).values() for job in group]
    assert sorted(ready) == ["new", "old"]


@pytest.mark.parametrize("ahead_s", [HOUR_S, -HOUR_S])
def test_what_a_cluster_tells_is_put_into_our_own_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead_s: float
) -> None:
    monkeypatch.setenv("MANTA_HOME", str(tmp_path / "home"))
    ray = FakeRay(tmp_path / "cluster")
    ray.ahead_s = ahead_s
    ray.start("a", {"entrypoint": "true"})
    ray.end("a")
    (job,) = ray_api.list_all(ray.record)
    ray.close()
    for at in (job.started_at, job.ended_at):
        assert at is not None
        assert abs(at - time.time()) < 30


def test_a_steady_clock_goes_on_when_the_machines_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Steady()
    before = clock.now("a")
    step_clock(monkeypatch, HOUR_S)
    assert 0 <= clock.now("a") - before < 60
    assert clock.now("b") - before >= HOUR_S, "who comes later is told the new time"
    clock.forget("a")
    assert clock.now("a") - before >= HOUR_S


def test_what_began_in_a_future_that_was_put_back_began_when_it_was_first_seen() -> None:
    clock = Steady()
    first = clock.now("a")
    assert clock.since("a", first - 10) == first - 10
    assert abs(clock.since("a", first + HOUR_S) - first) < 1
