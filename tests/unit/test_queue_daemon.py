"""The controller as a process: one at a time, started by itself, gone when it should be."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from queue_state import request

from manta import state as states
from manta.jobs import daemon, lease, queries, store
from manta.jobs.controller import Controller, Options
from manta.jobs.lease import LeaseLost
from manta.state import State, StateError


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "home"
    monkeypatch.setenv("MANTA_HOME", str(folder))
    monkeypatch.delenv("MANTA_STATE", raising=False)
    yield folder
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):  # as one is that ended uncollected
            if "queue" in process.cmdline():
                process.kill()
                process.wait()


@pytest.fixture
def state(home: Path) -> State:
    return states.open_state()


def until(check: Callable[[], Any], what: str, timeout_s: float = 20) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := check()):
        assert time.monotonic() < deadline, what
        time.sleep(0.05)
    return found


def pid_at_work(state: State) -> int:
    holder = lease.holder(state)
    return int(holder.split(" ")[1]) if holder else 0


def ensure(state: State) -> int | None:
    started = daemon.ensure(state, states.url())
    assert started is not None
    return started.pid


def test_of_many_commands_at_once_one_starts_the_controller(state: State) -> None:
    with ThreadPoolExecutor(20) as pool:
        pids = [pid for pid in pool.map(lambda _: ensure(state), range(20)) if pid]
    assert len(pids) == 1
    assert until(lambda: pid_at_work(state), "it has the lease") == pids[0]
    assert ensure(state) is None, "there is one"


def test_after_kill_9_the_next_command_starts_another_that_goes_to_work_at_once(
    state: State,
) -> None:
    first = ensure(state)
    assert first
    until(lambda: pid_at_work(state) == first, "the first has the lease")
    os.kill(first, signal.SIGKILL)
    os.waitpid(first, 0)
    begun = time.monotonic()
    second = ensure(state)
    until(lambda: pid_at_work(state) == second, "the second has the lease")
    assert time.monotonic() - begun < lease.TTL_S / 2, "it need not wait for the lease to expire"


def test_a_second_controller_waits_until_the_first_is_told_to_end(state: State) -> None:
    words = [sys.executable, "-m", "manta.cli.main", "queue"]
    first = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    until(lambda: pid_at_work(state) == first.pid, "the first has the lease")
    second = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    assert second.stderr is not None
    assert second.stderr.readline().startswith("waiting: ")
    assert pid_at_work(state) == first.pid
    first.terminate()
    assert first.wait(timeout=20) == 0
    until(lambda: pid_at_work(state) == second.pid, "the second has the lease")
    second.terminate()
    assert second.wait(timeout=20) == 0


def test_an_idle_controller_ends_and_one_whose_state_is_gone_does_too(home: Path) -> None:
    words = [sys.executable, "-m", "manta.cli.main", "queue"]
    idle = subprocess.run(
        [*words, "--stop-when-idle", "0"], stderr=subprocess.PIPE, text=True, timeout=30
    )
    assert idle.returncode == 0, idle.stderr
    opened = states.open_state()
    left = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    until(lambda: pid_at_work(opened) == left.pid, "it has the lease")
    shutil.rmtree(home)
    left.wait(timeout=20)


def test_a_controller_that_lost_its_lease_ends_without_another_write(state: State) -> None:
    mine = lease.acquire(state)
    assert mine is not None
    controller = Controller(state, mine, Options())
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(controller.run)
        time.sleep(0.3)
        with state.write() as connection:  # what a successor's `acquire` does after an expiry
            connection.execute(states.leases.update().values(holder="other 1 1", token=99))
        store.submit(state, request("a"), "ann")
        with pytest.raises(LeaseLost):
            ended.result(timeout=20)
    assert [event.kind for event in queries.events_of(state)] == ["submitted"]


def test_a_full_disk_is_one_line_and_changes_nothing(state: State) -> None:
    for number in range(20):
        store.submit(state, request(f"j{number}"), "ann")
    engine = state.engine

    def limit(connection: Any, _: Any, __: Any) -> None:
        connection.execute(f"PRAGMA max_page_count = {pages}")

    with state.read() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
    engine.dispose()
    states.sa.event.listen(engine, "checkout", limit)
    before = queries.counts(state)
    with pytest.raises(StateError, match="database or disk is full"):
        _fill(state)
    states.sa.event.remove(engine, "checkout", limit)
    engine.dispose()
    num_jobs = sum(queries.counts(state).values())
    assert num_jobs == len(queries.events_of(state)), "each job with its event, or neither"
    assert num_jobs >= sum(before.values())
    assert store.submit(state, request("after"), "ann")[1]


def _fill(state: State) -> None:
    for number in range(100, 400):
        store.submit(state, request(f"j{number}", entrypoint="x" * 500), "ann")
