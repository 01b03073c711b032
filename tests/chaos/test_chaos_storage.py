"""Storage fails three writes of ten: code is shipped and logs are complete all the same."""

from __future__ import annotations

import os
import random
import re
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from arena import Arena, is_one_line
from flaky_storage import flaky_storage
from terminal import MANTA, Terminal, end_controller

from manta.jobs import queries

NUM_JOBS = int(os.environ.get("MANTA_CHAOS_STORAGE_JOBS", "4"))
SHARE = 0.3
LOG = "for i in 1 2 3 4; do seq $((i * 100000)) $((i * 100000 + 49999)); sleep 0.3; done; cat mine"
MAX_TRIES = 40
RAYS_OWN = re.compile(r"[-\d]+ [:,\d]+\tINFO job_manager\.py:\d+ -- .*\n")
"""Ray's supervisor writes into the same file, now and then amid what the job writes."""


@pytest.mark.timeout(400)
def test_logs_are_complete_though_storage_fails_three_writes_of_ten(
    cluster: Terminal, tmp_path: Path
) -> None:
    seed = int(os.environ.get("MANTA_CHAOS_SEED", "0")) or random.randrange(1, 10**6)
    with flaky_storage(SHARE, seed) as (storage, environment):
        shell = replace(cluster, environment=cluster.environment | environment)
        arena = Arena(
            shell,
            tmp_path,
            database_url=f"sqlite:///{tmp_path}/state.db",
            storage_url="s3://manta/chaos",
        )
        refused: list[str] = []
        ids = [f"s{number}" for number in range(NUM_JOBS)]
        for job_id in ids:
            refused += _submit(arena, job_id)
        arena.all_end()
        tally = arena.tally(ids)
        logs = {i: RAYS_OWN.sub("", arena.terminal(MANTA, "logs", i).stdout) for i in ids}
        whole = [job_id for job_id in ids if logs[job_id].endswith(_expected(job_id))]
        states = [a.log_state for i in ids for a in queries.attempts_of(arena.state, i)]
        print(
            f"\nseed {seed}: {storage.num_failed} of {storage.num_writes} writes failed; {tally}; "
            f"{len(refused)} submissions refused in one line and sent again; "
            f"logs complete {len(whole)} of {NUM_JOBS}"
        )
        end_controller(arena.terminal, signal.SIGKILL)
    assert tally.is_clean
    assert tally.ended == {"SUCCEEDED": NUM_JOBS}
    assert all(map(is_one_line, refused)), refused
    assert set(states) == {"complete"}
    assert whole == ids, {i: (len(text), text[-300:]) for i, text in logs.items()}
    assert storage.num_failed > 0.15 * storage.num_writes, "the fault was there"


def _submit(arena: Arena, job_id: str) -> list[str]:
    """Send a job whose code is written to storage, until it is taken; returns the refusals."""
    (arena.terminal.folder / "mine").write_text(f"end-{job_id}\n")
    words = (MANTA, "submit", "--no-wait", "--id", job_id, "--", "sh", "-c", arena.noted(LOG))
    said: list[str] = []
    while (done := arena.terminal(*words, ok=None)).returncode:
        assert done.returncode == 1, done.stderr
        said.append(done.stderr)
        assert len(said) < MAX_TRIES
    return said


def _expected(job_id: str) -> str:
    """What its log ends with: every line, each once and in order, and its own end."""
    numbers = [n for i in (1, 2, 3, 4) for n in range(i * 100_000, i * 100_000 + 50_000)]
    return "".join(f"{n}\n" for n in numbers) + f"end-{job_id}\n"
