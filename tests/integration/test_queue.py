"""Durable jobs on a real cluster: what survives the controller, the head and the cluster."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from terminal import MANTA, RAY, Terminal, controller, end_controller, new_terminal, until

from manta import state as states
from manta.jobs import queries
from manta.state import State


@pytest.fixture
def terminal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Terminal]:
    shell = new_terminal(tmp_path_factory)
    shell(MANTA, "up", "--ports", "auto")
    yield shell
    shell(MANTA, "down", "--yes")
    end_controller(shell, signal.SIGKILL)


def _state(terminal: Terminal) -> State:
    return states.open_state(f"sqlite:///{terminal.home}/state.db")


def status(terminal: Terminal, job: str) -> str:
    """Read where the commands read, without their start-up."""
    found = queries.find(_state(terminal), job)
    return str(found.state) if found else ""


def events(terminal: Terminal, job: str) -> list[str]:
    return [event.kind for event in queries.events_of(_state(terminal), job_id=job)]


def cluster_pid(terminal: Terminal) -> int:
    record = terminal.home / "clusters" / "local" / "cluster.json"
    return int(json.loads(record.read_text())["pid"])


def test_what_was_accepted_survives_controller_head_and_cluster(
    terminal: Terminal, tmp_path: Path
) -> None:
    """One story, so that one cluster start pays for it; each part is a promise of its own."""
    _the_controller_is_killed_and_nothing_is_lost_or_run_twice(terminal, tmp_path)
    _plain_ray_jobs_are_kept_in_history(terminal)
    _a_job_that_forks_and_ignores_the_signal_is_gone_after_stop(terminal, tmp_path)
    _the_head_is_killed_and_replaced_and_the_job_runs_again(terminal, tmp_path)
    _history_answers_after_the_cluster_is_gone(terminal)


def _the_controller_is_killed_and_nothing_is_lost_or_run_twice(
    terminal: Terminal, tmp_path: Path
) -> None:
    ran, gate = tmp_path / "ran", tmp_path / "gate"
    work = f"echo $0 >> {ran}; until test -e {gate}; do sleep 0.1; done; echo late-$0"
    for number in range(3):
        terminal(MANTA, "submit", "--no-wait", "--id", f"k{number}", "--", "sh", "-c", work, "x")
        end_controller(terminal, signal.SIGKILL)  # with the submission under way
    terminal(MANTA, "jobs")  # starts the next controller
    until(lambda: ran.exists() and len(ran.read_text().split()) == 3, "three jobs run")
    end_controller(terminal, signal.SIGKILL)  # while they run
    gate.touch()
    terminal(MANTA, "jobs")
    for number in range(3):
        until(lambda n=number: status(terminal, f"k{n}") == "SUCCEEDED", f"k{number} ends")
        assert events(terminal, f"k{number}")[-2:] == ["running", "succeeded"]
        assert "late-x" in terminal(MANTA, "logs", f"k{number}").stdout
    assert len(ran.read_text().split()) == 3, "each ran once"


def _plain_ray_jobs_are_kept_in_history(terminal: Terminal) -> None:
    exports = terminal(MANTA, "env").stdout
    shell = f"{exports}\n{RAY} job submit --submission-id plain -- echo from-plain-ray"
    terminal("bash", "-c", shell)
    until(lambda: "succeeded" in events(terminal, "plain"), "plain is in the history")


def _a_job_that_forks_and_ignores_the_signal_is_gone_after_stop(
    terminal: Terminal, tmp_path: Path
) -> None:
    pids = tmp_path / "pids"
    code = (
        "import os, signal, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    if os.fork(): os._exit(0)\n"  # the grandchild is nobody's child
        f"open({str(pids)!r}, 'a').write(f'{{os.getpid()}} ')\n"
        "time.sleep(600)\n"
    )
    (terminal.folder / "stubborn.py").write_text(code)
    terminal(MANTA, "submit", "--no-wait", "--id", "stubborn", "--", "python", "stubborn.py")
    until(lambda: pids.exists() and len(pids.read_text().split()) == 2, "it has forked")
    terminal(MANTA, "stop", "stubborn")
    assert [pid for pid in map(int, pids.read_text().split()) if _lives(pid)] == []


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _the_head_is_killed_and_replaced_and_the_job_runs_again(
    terminal: Terminal, tmp_path: Path
) -> None:
    ran, gate = tmp_path / "ran-again", tmp_path / "gate-again"
    work = f"echo start >> {ran}; until test -e {gate}; do sleep 0.1; done"
    terminal(MANTA, "submit", "--no-wait", "--id", "moved", "--", "sh", "-c", work)
    until(lambda: ran.exists(), "it runs")
    os.kill(cluster_pid(terminal), signal.SIGKILL)
    until(lambda: "requeued" in events(terminal, "moved"), "the loss is seen")
    terminal(MANTA, "up", "--ports", "auto")
    gate.touch()
    until(lambda: status(terminal, "moved") == "SUCCEEDED", "it ends on the new cluster", 120)
    story = terminal.json("jobs", "show", "moved")
    assert [a["cause"] for a in story["attempts"]] == ["head_gone", ""]
    assert [a["submission_id"] for a in story["attempts"]] == ["moved", "moved-attempt-2"]
    assert len({a["cluster_id"] for a in story["attempts"]}) == 2


def _history_answers_after_the_cluster_is_gone(terminal: Terminal) -> None:
    terminal(MANTA, "submit", "--id", "last", "--", "sh", "-c", "echo the-last-word; exit 3", ok=1)
    terminal(MANTA, "down", "--yes")
    assert "the-last-word" in terminal(MANTA, "logs", "last").stdout
    assert "from-plain-ray" in terminal(MANTA, "logs", "plain").stdout
    story = terminal.json("jobs", "show", "last")
    assert story["status"] == "FAILED"
    assert story["attempts"][0]["exit_code"] == 3
    assert story["attempts"][0]["cause"] == "user_error"
    assert story["request"]["entrypoint"] == "sh -c 'echo the-last-word; exit 3'"
    accepted = terminal(MANTA, "submit", "--no-wait", "--id", "later", "--", "true")
    assert accepted.stdout.strip() == "later", "a cluster that is away can be queued for"
    time.sleep(0.5)
    assert status(terminal, "later") == "QUEUED"
    assert controller(terminal) is not None
