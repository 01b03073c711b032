"""A worker, an actor or the driver of a job is killed."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from arena import Arena
from terminal import until

from manta.jobs.model import Cause, JobState

WITH_RAY = """
import os, ray, sys, time
kind, folder = sys.argv[1:]
ray.init(log_to_driver=False)

def work():
    with open(f"{folder}/{kind}.pids", "a") as file:
        file.write(f"{os.getpid()} ")
    while not os.path.exists(f"{folder}/gate"):
        time.sleep(0.05)

if kind == "task":
    ray.get(ray.remote(num_cpus=0)(work).remote())
else:
    class Actor:
        def work(self):
            work()
    ray.get(ray.remote(num_cpus=0)(Actor).remote().work.remote())
"""


@pytest.mark.timeout(300)
def test_a_killed_process_of_a_job_is_retried_or_failed_by_its_cause(
    arena: Arena, tmp_path: Path
) -> None:
    (tmp_path / "work.py").write_text(WITH_RAY)
    for kind in ("task", "actor"):
        arena.submit(kind, f"exec python {tmp_path}/work.py {kind} {tmp_path}")
    for kind in ("driver-killed", "driver-ended"):
        wait = f"until test -e {tmp_path}/gate; do sleep 0.05; done"
        arena.submit(kind, f"echo -n $$' ' >> {tmp_path}/{kind}.pids; {wait}")
    arena.work()
    numbers = dict.fromkeys(("task", "actor", "driver-killed"), signal.SIGKILL)
    numbers["driver-ended"] = signal.SIGTERM
    for kind, number in numbers.items():
        until(lambda k=kind: (tmp_path / f"{k}.pids").exists(), f"{kind} runs")
        os.kill(int((tmp_path / f"{kind}.pids").read_text().split()[0]), number)
    for kind in ("task", "actor", "driver-killed"):
        until(lambda k=kind: len((tmp_path / f"{k}.pids").read_text().split()) == 2, f"{kind}: 2")
    (tmp_path / "gate").touch()
    arena.all_end()
    tally = arena.tally(numbers)
    causes = {kind: arena.causes(kind) for kind in numbers}
    print(f"\n4 processes killed; {tally}; {causes}")
    assert tally.is_clean
    assert causes["task"] == [""], "Ray itself runs a task again"
    assert causes["actor"] == [Cause.UNKNOWN, ""]
    assert causes["driver-killed"] == [Cause.OUT_OF_MEMORY, ""]
    assert causes["driver-ended"] == [Cause.USER_ERROR], "its own exit code is the user's"
    assert arena.job("driver-ended").state is JobState.FAILED
    assert tally.ended == {"SUCCEEDED": 3, "FAILED": 1}
