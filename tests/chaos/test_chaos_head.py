"""The head is killed and replaced while jobs are queued and running."""

from __future__ import annotations

import contextlib
import os

import psutil
import pytest
from arena import Arena, each
from terminal import until

from manta.cluster import processes
from manta.jobs.model import JobState

NUM_JOBS = int(os.environ.get("MANTA_CHAOS_HEAD_JOBS", "18"))


@pytest.mark.timeout(600)
def test_all_accepted_jobs_end_though_the_head_is_killed_and_replaced(arena: Arena) -> None:
    ids = each(NUM_JOBS, "h", lambda job_id: arena.submit(job_id, "sleep 2"))
    arena.work()
    heads = [arena.record["cluster_id"]]
    for kill in (kill_all_of_the_head, _kill_the_control_store):
        until(lambda: arena.count(JobState.RUNNING) >= 3, "some run")
        left = arena.count(JobState.QUEUED), arena.count(JobState.STARTING, JobState.RUNNING)
        kill(heads[-1], arena.record["pid"])
        print(f"\n{kill.__name__.strip('_')} with {left[0]} queued and {left[1]} on it")
        arena.replace_head()
        heads.append(arena.record["cluster_id"])
    arena.all_end(300)
    tally = arena.tally(ids)
    causes = [cause for job_id in ids for cause in arena.causes(job_id)]
    print(f"{len(heads) - 1} heads lost; {tally}; {causes.count('head_gone')} ended head_gone")
    assert tally.is_clean
    assert tally.ended == {"SUCCEEDED": NUM_JOBS}
    assert causes.count("head_gone") > 0, "jobs ran when the head was killed"
    assert set(causes) == {"", "head_gone"}


def kill_all_of_the_head(cluster_id: str, holder: int) -> None:
    """Control store, raylet, dashboard, and the process that holds them, at once."""
    for process in processes.members(cluster_id):
        with contextlib.suppress(psutil.NoSuchProcess):
            name, words = process.name(), " ".join(process.cmdline()[:4])
            if process.pid == holder or name in ("gcs_server", "raylet") or "dashboard" in words:
                process.kill()


def _kill_the_control_store(cluster_id: str, holder: int) -> None:
    stores = [process for process in processes.members(cluster_id) if _is_store(process)]
    assert len(stores) == 1
    stores[0].kill()


def _is_store(process: psutil.Process) -> bool:
    try:
        return process.name() == "gcs_server"
    except psutil.NoSuchProcess:
        return False
