"""Resource-hours: what jobs asked for, times how long they ran."""

from __future__ import annotations

from pathlib import Path

import pytest
from queue_state import request

from manta import state as states
from manta.jobs import lease, policy, store, usage
from manta.jobs.model import JobState
from manta.jobs.policy import Outcome
from manta.jobs.usage import Run

GPU2 = '[["CPU", 4.0], ["GPU", 2.0]]'


def test_hours_are_counted_within_the_window_and_up_to_now_for_what_runs() -> None:
    runs = [
        Run("a", GPU2, 0.0, 7200.0, False),
        Run("a", GPU2, 7200.0, None, False),
        Run("b", "[]", 0.0, 1800.0, True),
    ]
    found = usage.add_up(runs, 3600.0, 10800.0)
    assert list(found) == ["a", "b"]
    assert found["a"].hours == pytest.approx(2.0)
    assert found["a"].resource_hours == pytest.approx({"CPU": 8.0, "GPU": 4.0})
    assert (found["b"].hours, found["b"].failed_hours) == (0.0, 0.0)


def test_the_parts_of_all_owners_add_up_to_the_whole() -> None:
    runs = [Run(f"u{n % 3}", GPU2, float(n), float(n * n), n % 2 == 0) for n in range(1, 60)]
    found = usage.add_up(runs, 0.0, 1e9)
    whole = sum(max(0.0, n * n - n) for n in range(1, 60)) / 3600
    assert sum(held.hours for held in found.values()) == pytest.approx(whole)
    assert sum(h.resource_hours["GPU"] for h in found.values()) == pytest.approx(2 * whole)


def test_the_report_reads_attempts_of_the_state_by_team_user_or_job(tmp_path: Path) -> None:
    state = states.open_state(f"sqlite:///{tmp_path}/state.db")
    held = lease.acquire(state)
    assert held is not None
    asked = request("a", team="ml", user="ann", shape=GPU2)
    job, _ = store.submit(state, asked, "ann")
    job, attempt = store.begin_attempt(state, held, job, cluster="local", cluster_id="c")
    start = states.now() - 7200
    job = store.mark_running(state, held, job, attempt, at=start, node_id="n")
    outcome = Outcome(state=JobState.SUCCEEDED, cause=policy.Cause.NONE, message="")
    verdict = policy.after(asked, outcome, num_failures=0, stop_reason="", now=0)
    store.end_attempt(
        state, held, job, attempt, outcome, verdict, ended_at=start + 3600, log_state="complete"
    )
    for by, name in (("team", "ml"), ("user", "ann"), ("job", "a")):
        found = usage.report(state, by, 0.0)  # type: ignore[arg-type]
        assert list(found) == [name]
        assert found[name].resource_hours == pytest.approx({"CPU": 4.0, "GPU": 2.0})
    assert usage.report(state, "team", states.now()) == {}
    state.close()
