"""The database server crashes and comes back while jobs run."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest
from arena import Arena, each, is_one_line
from queue_state import postgresql, start_postgresql, stop_postgresql
from service import services
from terminal import MANTA, Terminal, until

from manta.jobs import lease
from manta.jobs.model import JobState

AWAY_S = (0.0, 3.0, lease.TTL_S + 2)
"""So long the server is away, each time; at last for longer than a lease is good for."""
NUM_JOBS = 4
"""For each of them."""
WORK = "echo begin; sleep 3; echo end"


@pytest.mark.timeout(400)
def test_nothing_is_lost_or_run_twice_when_the_database_restarts(
    cluster: Terminal, tmp_path: Path
) -> None:
    pytest.importorskip("psycopg", reason="no PostgreSQL driver")
    with postgresql() as home:
        url = f"postgresql+psycopg://manta@/postgres?host={home}"
        arena = Arena(cluster, tmp_path, database_url=url)
        with services(arena.terminal, arena.terminal, folder=tmp_path) as controllers:
            ids, refused, followers = [], [], []
            for number, away_s in enumerate(AWAY_S):
                ids += each(NUM_JOBS, f"d{number}-", lambda i: arena.submit(i, WORK))
                until(lambda: arena.count(JobState.RUNNING) >= 2, "some run")
                followers.append(_follow(arena, ids[-1]))
                back_at = time.monotonic() + away_s
                stop_postgresql(home)
                while time.monotonic() < back_at:
                    refused.append(_refused(arena))
                    time.sleep(min(4.0, max(0.0, back_at - time.monotonic())))
                start_postgresql(home)
            arena.all_end()
            followed = [process.communicate(timeout=60)[0] for process in followers]
            tally = arena.tally(ids)
            num_starts = [controller.num_starts for controller in controllers]
            holder = lease.holder(arena.state)
        print(
            f"\n{len(AWAY_S)} restarts, away for {AWAY_S} s; {tally}; two controllers started "
            f"{num_starts} times; {len(refused)} submissions meanwhile refused in one line; "
            f"{sum(map(_has_end, followed))} of {len(followed)} `manta logs -f` went on to the end"
        )
        assert tally.is_clean
        assert tally.ended == {"SUCCEEDED": len(ids)}
        assert tally.num_runs == tally.num_attempts
        assert all(map(is_one_line, refused)), refused
        assert holder, "a controller is at work"
        assert [process.returncode for process in followers] == [0] * len(AWAY_S), followed
        assert all(map(_has_end, followed)), followed
        arena.state.close()


def _follow(arena: Arena, job_id: str) -> subprocess.Popen[str]:
    """`manta logs -f`, which has begun to print."""
    process = arena.terminal.start(MANTA, "logs", "-f", job_id)
    assert process.stdout is not None
    assert process.stdout.readline()
    return process


def _has_end(text: str) -> bool:
    return "end" in text.splitlines()


def _refused(arena: Arena) -> str:
    """What a submission is told while there is no database."""
    words = (MANTA, "submit", "--no-wait", "--id", "never", "--", "true")
    return arena.terminal(*words, ok=1).stderr
