"""The controller is killed again and again while jobs run; what was lost or run twice is counted.

MANTA_CHAOS_JOBS=200 MANTA_CHAOS_KILLS=50 pytest -s tests/chaos/test_chaos_queue.py
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "integration"))
from terminal import MANTA, Terminal, end_controller, new_terminal, until

from manta import state as states
from manta.jobs import queries, store
from manta.jobs.model import JobRequest, JobState
from manta.state import State

NUM_JOBS = int(os.environ.get("MANTA_CHAOS_JOBS", "24"))
NUM_KILLS = int(os.environ.get("MANTA_CHAOS_KILLS", "6"))


@pytest.fixture
def terminal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Terminal]:
    shell = new_terminal(tmp_path_factory)
    shell(MANTA, "up", "--ports", "auto")
    yield shell
    shell(MANTA, "down", "--yes")
    end_controller(shell, signal.SIGKILL)


@pytest.mark.timeout(1200)
def test_a_controller_killed_at_random_moments_loses_nothing_and_runs_nothing_twice(
    terminal: Terminal, tmp_path: Path
) -> None:
    seed = int(os.environ.get("MANTA_CHAOS_SEED", "0")) or random.randrange(1, 10**6)
    chance, ran = random.Random(seed), tmp_path / "ran"
    state = states.open_state(f"sqlite:///{terminal.home}/state.db")
    for number in range(NUM_JOBS):
        store.submit(state, _request(terminal, f"c{number}", ran), "chaos")
    num_kills = _kill_while_they_run(terminal, state, chance)
    terminal(MANTA, "jobs")  # starts the last controller
    until(lambda: _num_unfinished(state) == 0, "all jobs end", timeout_s=900)
    started = Counter(line.split()[0] for line in ran.read_text().splitlines())
    jobs = queries.listed(state)
    attempts = {job.id: len(queries.attempts_of(state, job.id)) for job in jobs}
    ended = Counter(str(job.state) for job in jobs)
    logs = sum(f"end-{j.id}" in terminal(MANTA, "logs", j.id).stdout for j in jobs[:10])
    print(
        f"\nseed {seed}: {num_kills} kills, {len(jobs)} jobs: {dict(ended)}; "
        f"{sum(started.values())} runs for {sum(attempts.values())} attempts; "
        f"lost {NUM_JOBS - len(started)}, "
        f"twice {sum(n > attempts[i] for i, n in started.items())}; "
        f"logs with their end {logs} of {min(10, len(jobs))}"
    )
    assert num_kills >= min(3, NUM_KILLS), "all had ended before it was killed: give it more jobs"
    assert ended == {"SUCCEEDED": NUM_JOBS}
    assert started == attempts, "each ran exactly as often as its attempts say"
    assert logs == min(10, len(jobs))


def _kill_while_they_run(terminal: Terminal, state: State, chance: random.Random) -> int:
    """Start a controller and kill it, while jobs are left, at most NUM_KILLS times; how often."""
    for number in range(NUM_KILLS):
        if not _num_unfinished(state):
            return number
        process = subprocess.Popen(
            [MANTA, "queue"],
            env=terminal.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        until(lambda p=process: _is_at_work(state, p.pid), "the controller has the lease")
        time.sleep(chance.uniform(0.0, 2.0))
        process.kill()
        process.wait()
    return NUM_KILLS


def _is_at_work(state: State, pid: int) -> bool:
    from manta.jobs import lease

    holder = lease.holder(state)
    return holder is not None and holder.split(" ")[1] == str(pid)


def _num_unfinished(state: State) -> int:
    return sum(n for name, n in queries.counts(state).items() if not JobState(name).done)


def _request(terminal: Terminal, job_id: str, ran: Path) -> JobRequest:
    # One short line, appended at once: two jobs never mix theirs.
    work = f"echo {job_id} $$ >> {ran}; sleep 0.3; echo end-{job_id}"
    return JobRequest(
        id=job_id,
        name="chaos",
        entrypoint=work,
        runtime_env_passthrough={},
        user="chaos",
        cluster="local",
        storage_url=terminal.environment["MANTA_STORAGE"],
    )
