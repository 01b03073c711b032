"""The clock steps while jobs run, and the machines of two controllers have different ones."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from arena import Arena, each
from queue_state import postgresql
from service import services
from shifted_clock import shifted
from terminal import MANTA, Terminal, end_controller, until

from manta.jobs import lease, queries
from manta.jobs.model import Cause, JobState

HOUR_S = 3600
STEPS_S = (HOUR_S, -HOUR_S, 0)
"""How far the clock is ahead after each step, seconds."""
NUM_JOBS = 2
"""For each step, besides one that has a short time-out and one that is tried again."""
CRON_JOB = """
name: tick
entrypoint: "{entrypoint}"
"""


@pytest.fixture
def stepped(cluster: Terminal, tmp_path: Path) -> Iterator[tuple[Arena, object]]:
    clock = shifted(cluster, tmp_path / "clock")
    arena = Arena(clock.terminal, tmp_path, database_url=f"sqlite:///{tmp_path}/state.db")
    yield arena, clock.step_to
    end_controller(arena.terminal, signal.SIGKILL)
    arena.state.close()


@pytest.mark.timeout(400)
def test_a_stepped_clock_runs_nothing_twice_and_times_nothing_out(stepped: tuple) -> None:
    arena, step_to = stepped
    begun, ids = time.monotonic(), []
    _add_cron(arena)
    arena.work()
    for number, ahead_s in enumerate(STEPS_S):
        ids += _send_some(arena, number)
        flaky = f"again{number}"
        until(lambda: arena.count(JobState.RUNNING) >= NUM_JOBS, "they run")
        until(lambda f=flaky: arena.causes(f)[:1] == [Cause.USER_ERROR], "one waits for its retry")
        step_to(ahead_s)
        if ahead_s < 0:  # its lease is now of the future
            end_controller(arena.terminal, signal.SIGKILL)
            arena.work()
        arena.all_end(90)
    minutes = (time.monotonic() - begun) / 60
    ticks = [job.id for job in queries.listed(arena.state) if job.id.startswith("tick-")]
    tally = arena.tally([*ids, *ticks])
    causes = {job_id: arena.causes(job_id) for job_id in ids}
    usage = arena.terminal.json("usage")
    print(
        f"\n{len(STEPS_S)} steps to {STEPS_S} s within {minutes:.1f} min; {tally}; "
        f"{len(ticks)} jobs of a cron line of each minute"
    )
    assert tally.is_clean
    assert {i for i, found in causes.items() if Cause.TIMEOUT in found} == {
        f"slow{number}" for number in range(len(STEPS_S))
    }
    assert all(causes[f"again{n}"] == [Cause.USER_ERROR, ""] for n in range(len(STEPS_S)))
    assert tally.ended == {"SUCCEEDED": len(ids) + len(ticks) - 3, "FAILED": 3}
    assert tally.num_runs == tally.num_attempts
    assert len(ticks) <= minutes + 1 + sum(step > 0 for step in STEPS_S), "no storm"
    assert usage, "what it cost can be told"


def _send_some(arena: Arena, number: int) -> list[str]:
    ids = each(NUM_JOBS, f"c{number}-", lambda i: arena.submit(i, "sleep 4", timeout_s=600))
    arena.submit(f"slow{number}", "sleep 600", timeout_s=8)
    once = arena.ran.with_name(f"once{number}")
    retry = {"backoff_s": 6, "max_retries": 1, "on": ["user_error"]}
    work = f"test -e {once} || {{ touch {once}; exit 5; }}"
    arena.submit(f"again{number}", work, retry=retry)
    return [*ids, f"slow{number}", f"again{number}"]


def _add_cron(arena: Arena) -> None:
    """A job for each minute, by the terminal's own clock."""
    script = arena.terminal.folder / "tick.sh"
    script.write_text(arena.noted("true"))
    (arena.terminal.folder / "tick.yaml").write_text(CRON_JOB.format(entrypoint=f"sh {script}"))
    arena.terminal(MANTA, "cron", "add", "tick", "* * * * *", "tick.yaml")


@pytest.mark.timeout(300)
def test_controllers_whose_clocks_are_two_hours_apart_take_turns(
    cluster: Terminal, tmp_path: Path
) -> None:
    pytest.importorskip("psycopg", reason="no PostgreSQL driver")
    with postgresql() as home:
        url = f"postgresql+psycopg://manta@/postgres?host={home}"
        arena = Arena(cluster, tmp_path, database_url=url)
        early = shifted(arena.terminal, tmp_path / "early", -HOUR_S).terminal
        late = shifted(arena.terminal, tmp_path / "late", HOUR_S).terminal
        with services(early, late, folder=tmp_path) as controllers:
            first = until(lambda: lease.holder(arena.state), "one is at work")
            ids = each(6, "p", lambda i: arena.submit(i, "sleep 2", timeout_s=600))
            arena.all_end()
            time.sleep(2 * lease.RENEW_S)
            assert lease.holder(arena.state) == first, "the other waits"
            assert [controller.num_starts for controller in controllers] == [1, 1]
            holder = next(
                c for c in controllers if c.process and str(c.process.pid) == first.split(" ")[1]
            )
            controllers.remove(holder)
            holder.end()
            ids += each(6, "q", lambda i: arena.submit(i, "sleep 2", timeout_s=600))
            begun = time.monotonic()
            until(lambda: lease.holder(arena.state) not in (None, first), "the other took over")
            took_s = time.monotonic() - begun
            arena.all_end()
        tally = arena.tally(ids)
        print(f"\ntwo clocks 2 h apart; {tally}; the second took over after {took_s:.1f} s")
        assert tally.is_clean
        assert tally.ended == {"SUCCEEDED": len(ids)}
        assert tally.num_runs == tally.num_attempts
        arena.state.close()
