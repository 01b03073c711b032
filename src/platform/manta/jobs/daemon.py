"""The controller as a process: in the foreground, or started by itself when a command needs it.

On one machine a lock file beside the SQLite file says whether a controller lives: the system drops
the lock with the process, however it ends. Whoever starts one takes the lock first and hands it on
to the child, so that of fifty commands at once one starts it.
"""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from manta import state as states
from manta.cluster import record
from manta.cluster.processes import CLUSTER_ID_VARIABLE
from manta.errors import MantaError
from manta.jobs import lease as leases
from manta.jobs.controller import Controller, Options
from manta.state import State, StateError

LOCK_VARIABLE = "MANTA_QUEUE_LOCK"
"""Number of the inherited descriptor that holds the lock."""
LOG_BYTES = 4 * 2**20

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Started:
    """What `ensure` did."""

    pid: int | None
    """Of the controller that it started; None if there was one."""
    log_path: Path


def log_path() -> Path:
    """Where a controller that was started by itself writes."""
    return record.home() / "queue.log"


def ensure(state: State, database_url: str) -> Started | None:
    """See that a controller works on this state; returns at once.

    For a database server nothing is started, as its controller is a service: None then.

    Raises:
        MantaError: the state is on a server and no controller holds the lease.
    """
    file = states.file_of(database_url)
    if file is None:
        if leases.holder(state) is None:
            raise MantaError("no controller is at work", "start `manta queue` where it belongs")
        return None
    descriptor = _take(file)
    if descriptor is None:
        return Started(pid=None, log_path=log_path())
    try:
        return Started(pid=_spawn(descriptor, database_url), log_path=log_path())
    finally:
        os.close(descriptor)


def run(state: State, database_url: str, options: Options, tell: Callable[[str], None]) -> None:
    """Be the controller until told to stop, waiting for the lease first.

    Raises LeaseLost if another took over.
    """
    stopping = threading.Event()
    controllers: list[Controller] = []

    def end(number: int, frame: object) -> None:
        stopping.set()
        for controller in controllers:
            controller.stop()

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
    held = _hold(database_url)
    try:
        lease = _wait_for_lease(state, stopping, tell)
        if lease is None:
            return
        tell(f"working on {states.shown(database_url)}")
        own = replace(options, file=states.file_of(database_url))
        controllers.append(Controller(state, lease, own))
        if not stopping.is_set():
            controllers[0].run()
        lease.release(state)
    finally:
        if held is not None:
            os.close(held)


def _wait_for_lease(
    state: State, stopping: threading.Event, tell: Callable[[str], None]
) -> leases.Lease | None:
    told = False
    while not stopping.is_set():
        try:
            if (lease := leases.acquire(state)) is not None:
                return lease
            if not told:
                tell(f"waiting: {leases.holder(state)} is at work")
            told = True
        except StateError as error:
            log.warning("%s", error)
        stopping.wait(1.0)
    return None


def _hold(database_url: str) -> int | None:
    """The lock as inherited, or taken now; None if it is not for this process to take."""
    if inherited := os.environ.pop(LOCK_VARIABLE, ""):
        return int(inherited)
    file = states.file_of(database_url)
    return _take(file) if file is not None else None


def _take(file: Path) -> int | None:
    descriptor = os.open(file.with_name(file.name + ".lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _spawn(descriptor: int, database_url: str) -> int:
    environment = {
        name: value
        for name, value in os.environ.items()
        if name != CLUSTER_ID_VARIABLE and not name.startswith("RAY_")
    }  # a job may submit: its controller must not end with the job's cluster
    environment |= {LOCK_VARIABLE: str(descriptor), states.URL_VARIABLE: database_url}
    path = log_path()
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if path.exists() and path.stat().st_size > LOG_BYTES:
        path.replace(path.with_suffix(".log.1"))
    with path.open("ab") as output:
        child = subprocess.Popen(
            [sys.executable, "-m", "manta.cli.main", "queue", "--stop-when-idle", "10"],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd="/",
            start_new_session=True,  # outlives the terminal, and does not see its Ctrl-C
            pass_fds=(descriptor,),
        )
    return child.pid
