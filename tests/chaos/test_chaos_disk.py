"""The disk with the state is full for a while."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest
from arena import Arena, each, is_one_line
from small_disk import small_disk
from terminal import MANTA, Terminal, end_controller, until

from manta.jobs.model import JobState

NUM_JOBS = 6


@pytest.mark.timeout(300)
def test_a_full_disk_is_one_line_for_each_submission_and_nothing_is_lost(
    cluster: Terminal, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", "12m"):
        url = f"sqlite:///{tmp_path}/disk/state.db"
        arena = Arena(cluster, tmp_path, database_url=url)
        ids = each(NUM_JOBS, "f", lambda job_id: arena.submit(job_id, "sleep 2"))
        arena.work()
        until(lambda: arena.count(JobState.RUNNING) >= 2, "some run")
        ballast = tmp_path / "disk" / "ballast"
        num_bytes = _fill(ballast)
        refused, lucky = _refused(arena)
        until(lambda: arena.num_runs() >= arena.count(JobState.STARTING, JobState.RUNNING), "run")
        seen = arena.count(*JobState)
        ballast.unlink()
        late = _submit(arena, "late", ok=0)
        arena.all_end()
        tally = arena.tally([*ids, *lucky, "late"])
        print(
            f"\n{num_bytes} bytes filled the disk; {len(refused)} submissions refused in a line; "
            f"{seen} jobs seen meanwhile; {tally}"
        )
        end_controller(arena.terminal, signal.SIGKILL)
        arena.state.close()
    assert all(map(is_one_line, refused)), refused
    assert all("full" in said for said in refused), refused
    assert seen == NUM_JOBS + len(lucky)
    assert is_one_line(late) or not late
    assert tally.is_clean
    assert tally.ended == {"SUCCEEDED": NUM_JOBS + len(lucky) + 1}
    assert tally.num_runs == tally.num_attempts


def _fill(file: Path) -> int:
    """Write until nothing more goes on the disk; returns the bytes."""
    done = subprocess.run(["cp", "/dev/zero", file], capture_output=True, text=True)
    assert "No space left" in done.stderr, done.stderr
    return file.stat().st_size


def _refused(arena: Arena) -> tuple[list[str], list[str]]:
    """What three submissions were told, and ids of those before that still found room.

    SQLite's log has some pages to spare, so that a full disk is not felt at once.
    """
    lucky: list[str] = []
    for number in range(20):
        job_id = f"lucky{number}"
        words = (
            MANTA,
            "submit",
            "--no-wait",
            "--id",
            job_id,
            "--",
            "sh",
            "-c",
            arena.noted("true"),
        )
        done = arena.terminal(*words, ok=None)
        if done.returncode:
            return [done.stderr, *(_submit(arena, f"never{n}") for n in range(2))], lucky
        lucky.append(job_id)
    raise AssertionError("the full disk was never felt")


def _submit(arena: Arena, job_id: str, ok: int = 1) -> str:
    words = (MANTA, "submit", "--no-wait", "--id", job_id, "--", "sh", "-c", arena.noted("true"))
    return arena.terminal(*words, ok=ok).stderr
