"""The controller is killed again and again while jobs run; what was lost or run twice is counted.

MANTA_CHAOS_JOBS=200 MANTA_CHAOS_KILLS=50 pytest -s tests/chaos/test_chaos_queue.py
"""

from __future__ import annotations

import os
import random
import subprocess
import time

import pytest
from arena import Arena
from terminal import MANTA, until

from manta.jobs import lease
from manta.jobs.model import JobState

NUM_JOBS = int(os.environ.get("MANTA_CHAOS_JOBS", "24"))
NUM_KILLS = int(os.environ.get("MANTA_CHAOS_KILLS", "6"))


@pytest.mark.timeout(1800)
def test_a_controller_killed_at_random_moments_loses_nothing_and_runs_nothing_twice(
    arena: Arena,
) -> None:
    seed = int(os.environ.get("MANTA_CHAOS_SEED", "0")) or random.randrange(1, 10**6)
    chance, begun = random.Random(seed), time.monotonic()
    ids = [f"c{number}" for number in range(NUM_JOBS)]
    on_it = _kill_while_they_run(arena, ids, chance)
    arena.work()  # starts the last controller
    arena.all_end(900)
    tally = arena.tally(ids)
    told = random.Random(seed).sample(ids, min(10, NUM_JOBS))
    logs = sum(f"end-{i}" in arena.terminal(MANTA, "logs", i).stdout for i in told)
    print(
        f"\nseed {seed}: {len(on_it)} kills with {min(on_it)} to {max(on_it)} jobs on the "
        f"cluster, within {time.monotonic() - begun:.0f} s; {tally}; "
        f"logs with their end {logs} of {len(told)}"
    )
    assert tally.is_clean
    assert tally.ended == {"SUCCEEDED": NUM_JOBS}
    assert tally.num_runs == tally.num_attempts, "each ran exactly as often as its attempts say"
    assert logs == len(told)


def _kill_while_they_run(arena: Arena, ids: list[str], chance: random.Random) -> list[int]:
    """Start a controller and kill it, NUM_KILLS times; how many jobs were on the cluster then.

    Half of the jobs are there at first, the others come in between, so that there are always some.
    """
    waiting, on_it = list(ids), []
    for number in range(NUM_KILLS):
        left = len(ids) // 2 * (NUM_KILLS - 1 - number) // NUM_KILLS
        while len(waiting) > left:
            job_id = waiting.pop(0)
            arena.submit(job_id, f"sleep 0.3; echo end-{job_id}")
        log = arena.terminal.folder / "queue.log"
        with log.open("ab") as output:
            process = subprocess.Popen(
                [MANTA, "queue"], env=arena.terminal.environment, stdout=output, stderr=output
            )
        until(lambda p=process: _is_at_work(arena, p.pid), "the controller has the lease")
        time.sleep(chance.uniform(0.0, 2.0))
        on_it.append(arena.count(JobState.STARTING, JobState.RUNNING))
        process.kill()
        process.wait()
    return on_it


def _is_at_work(arena: Arena, pid: int) -> bool:
    holder = lease.holder(arena.state)
    return holder is not None and holder.split(" ")[1] == str(pid)
