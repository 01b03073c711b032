"""The database server crashes and comes back while jobs run."""

from __future__ import annotations

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
NUM_JOBS = 6
"""For each of them."""


@pytest.mark.timeout(400)
def test_nothing_is_lost_or_run_twice_when_the_database_restarts(
    cluster: Terminal, tmp_path: Path
) -> None:
    pytest.importorskip("psycopg", reason="no PostgreSQL driver")
    with postgresql() as home:
        url = f"postgresql+psycopg://manta@/postgres?host={home}"
        arena = Arena(cluster, tmp_path, database_url=url)
        with services(arena.terminal, arena.terminal, folder=tmp_path) as controllers:
            ids, refused = [], []
            for number, away_s in enumerate(AWAY_S):
                ids += each(NUM_JOBS, f"d{number}-", lambda i: arena.submit(i, "sleep 2"))
                until(lambda: arena.count(JobState.RUNNING) >= 2, "some run")
                back_at = time.monotonic() + away_s
                stop_postgresql(home)
                while time.monotonic() < back_at:
                    refused.append(_refused(arena))
                    time.sleep(min(4.0, max(0.0, back_at - time.monotonic())))
                start_postgresql(home)
            arena.all_end()
            tally = arena.tally(ids)
            num_starts = [controller.num_starts for controller in controllers]
            holder = lease.holder(arena.state)
        print(
            f"\n{len(AWAY_S)} restarts, away for {AWAY_S} s; {tally}; two controllers started "
            f"{num_starts} times; {len(refused)} submissions meanwhile refused in one line"
        )
        assert tally.is_clean
        assert tally.ended == {"SUCCEEDED": len(ids)}
        assert tally.num_runs == tally.num_attempts
        assert all(map(is_one_line, refused)), refused
        assert holder, "a controller is at work"
        arena.state.close()


def _refused(arena: Arena) -> str:
    """What a submission is told while there is no database."""
    words = (MANTA, "submit", "--no-wait", "--id", "never", "--", "true")
    return arena.terminal(*words, ok=1).stderr
