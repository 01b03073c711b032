"""Why jobs end, on a real cluster: each cause is provoked, and what Ray says of it is read."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from terminal import MANTA, Terminal, end_controller, new_terminal, until

from manta import state as states
from manta.jobs import queries, store
from manta.jobs.model import Cause, Job, JobRequest, JobState
from manta.state import State


@dataclass(frozen=True)
class Place:
    """A cluster and the state that a controller works on."""

    terminal: Terminal
    state: State

    def submit(self, job_id: str, entrypoint: str, **changes: Any) -> None:
        values = {
            "id": job_id,
            "name": "cause",
            "entrypoint": entrypoint,
            "runtime_env_passthrough": {},
            "user": "test",
            "cluster": "local",
            "storage_url": self.terminal.environment["MANTA_STORAGE"],
            "retry": {"backoff_s": 0.1, "max_retries": 1},
        }
        store.submit(self.state, JobRequest.model_validate(values | changes), "test")

    def ended(self, job_id: str) -> Job:
        def done() -> Job | None:
            job = queries.get(self.state, job_id)
            return job if job.state.done else None

        job: Job = until(done, f"{job_id} ends", 120)
        return job

    def causes(self, job_id: str) -> list[str]:
        return [str(a.cause) for a in queries.attempts_of(self.state, job_id)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    shell = new_terminal(tmp_path_factory)
    shell(MANTA, "up", "--ports", "auto")
    shell(MANTA, "jobs")  # starts the controller
    yield Place(shell, states.open_state(f"sqlite:///{shell.home}/state.db"))
    shell(MANTA, "down", "--yes")
    end_controller(shell, signal.SIGKILL)


@pytest.fixture(scope="module")
def sent(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """All that need no hand in it, at once: they run side by side."""
    folder = tmp_path_factory.mktemp("sent")
    place.submit("raises", f"{sys.executable} -c 'raise ValueError(1)'")
    asked = {"backoff_s": 0.1, "max_retries": 1, "on": ["user_error"]}
    place.submit("asked", f"echo x >> {folder}/asked; exit 5", retry=asked)
    place.submit("killed", "kill -9 $$")
    place.submit("slow", "sleep 600", timeout_s=1.5)
    place.submit("late", "sleep 600", deadline_s=4)
    broken = {"working_dir": "gcs://_ray_pkg_0123456789abcdef.zip"}  # which nobody has put there
    place.submit("environment", "true", runtime_env_passthrough=broken)
    return place


def test_the_users_exception_is_not_retried(sent: Place) -> None:
    job = sent.ended("raises")
    assert (job.state, job.cause) == (JobState.FAILED, Cause.USER_ERROR)
    assert "ValueError: 1" in job.message
    assert sent.causes("raises") == ["user_error"]


def test_the_users_exception_is_retried_where_asked(sent: Place) -> None:
    assert sent.ended("asked").cause is Cause.USER_ERROR
    assert [a.exit_code for a in queries.attempts_of(sent.state, "asked")] == [5, 5]


def test_a_driver_that_got_sigkill_counts_as_out_of_memory_and_is_retried(sent: Place) -> None:
    assert sent.ended("killed").cause is Cause.OUT_OF_MEMORY
    assert sent.causes("killed") == ["out_of_memory", "out_of_memory"]


def test_a_time_out_ends_the_attempt(sent: Place) -> None:
    job = sent.ended("slow")
    assert (job.state, job.cause) == (JobState.FAILED, Cause.TIMEOUT)
    assert job.message == "timeout: over 1.5 s of running"


def test_a_deadline_ends_the_job(sent: Place) -> None:
    job = sent.ended("late")
    assert (job.state, job.cause) == (JobState.FAILED, Cause.DEADLINE)


def test_an_environment_that_cannot_be_set_up_is_the_users_to_mend(sent: Place) -> None:
    job = sent.ended("environment")
    assert (job.state, job.cause) == (JobState.FAILED, Cause.ENVIRONMENT)
    assert len(sent.causes("environment")) == 1


def test_a_supervisor_that_dies_is_retried_and_the_job_succeeds(
    place: Place, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    place.submit("orphan", f"until test -e {gate}; do sleep 0.1; done")
    until(lambda: queries.get(place.state, "orphan").state is JobState.RUNNING, "it runs")
    _supervisor("orphan").kill()
    gate.touch()
    assert place.ended("orphan").state is JobState.SUCCEEDED
    first, second = queries.attempts_of(place.state, "orphan")
    assert first.cause in (Cause.UNKNOWN, Cause.NODE_LOST), first.message
    assert second.cause is Cause.NONE


def _supervisor(submission_id: str) -> psutil.Process:
    """Ray's actor that started the driver: the driver's parent."""
    for process in psutil.process_iter():
        try:
            config = process.environ().get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
            parent = process.parent()
        except psutil.Error:
            continue
        told = json.loads(config).get("metadata", {}).get("job_submission_id")
        if told == submission_id and parent and "JobSupervisor" in " ".join(parent.cmdline()):
            return parent
    raise AssertionError(f"no supervisor of {submission_id}")


def test_an_id_that_a_plain_ray_job_holds_is_refused_and_says_so(place: Place) -> None:
    exports = place.terminal(MANTA, "env").stdout
    ray = Path(MANTA).with_name("ray")
    shell = f"{exports}\n{ray} job submit --submission-id squatter --no-wait -- sleep 1"
    end_controller(place.terminal)  # nobody sees the plain job before ours is accepted
    place.terminal("bash", "-c", shell)
    place.submit("squatter", "echo ours")
    place.terminal(MANTA, "jobs")
    job = place.ended("squatter")
    assert (job.state, job.cause) == (JobState.FAILED, Cause.REFUSED)
    assert job.message == "its id is another job's on the cluster"
