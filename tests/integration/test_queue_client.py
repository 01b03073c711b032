"""The Python client, on a cluster, from a program."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
from terminal import MANTA, Terminal, end_controller, new_terminal

from manta.client import Client, JobSpec, JobState
from manta.errors import InputError, MantaError


@pytest.fixture(scope="module")
def terminal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Terminal]:
    shell = new_terminal(tmp_path_factory)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MANTA_HOME", "MANTA_STORAGE"):
            patch.setenv(name, shell.environment[name])
        shell(MANTA, "up", "--ports", "auto")
        yield shell
        shell(MANTA, "down", "--yes")
        end_controller(shell, signal.SIGKILL)


def test_a_program_submits_waits_and_reads_the_log(terminal: Terminal) -> None:
    client = Client()
    (terminal.folder / "said.txt").write_text("from the file\n")
    job = client.submit("cat said.txt", working_dir=terminal.folder, job_id="py")
    assert client.submit("cat said.txt", working_dir=terminal.folder, job_id="py").seq == job.seq
    assert client.wait("py", timeout_s=180).state is JobState.SUCCEEDED
    assert "from the file" in client.log("py")
    assert [event.kind for event in client.events("py")][-1] == "succeeded"
    assert [job.id for job in client.jobs(states=[JobState.SUCCEEDED])] == ["py"]
    with pytest.raises(InputError, match=r"job id py belongs to `cat said\.txt`"):
        client.submit("true", working_dir=terminal.folder, job_id="py")


def test_a_job_that_is_stopped_ends_and_can_be_retried(terminal: Terminal) -> None:
    client = Client()
    spec = JobSpec(name="long", entrypoint="sleep 300", team="ml")
    job = client.submit(spec, working_dir=terminal.folder)
    with pytest.raises(MantaError, match=r"is (QUEUED|STARTING|RUNNING) after 0 s"):
        client.wait(job.id, timeout_s=0)
    client.stop(job.id)
    assert client.wait(job.id, timeout_s=180).state is JobState.STOPPED
    assert client.retry(job.id).state is JobState.QUEUED
    client.stop(job.id)
    assert client.wait(job.id, timeout_s=180).state is JobState.STOPPED


def test_a_cluster_that_nobody_has_seen_is_refused(terminal: Terminal) -> None:
    with pytest.raises(InputError, match="no cluster `nowhere` is up; known clusters: local"):
        Client().submit("true", working_dir=terminal.folder, cluster="nowhere")
