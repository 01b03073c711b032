"""The processes of one cluster on this machine, found by what they carry, never by name."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Sequence

import psutil

CLUSTER_ID_VARIABLE = "MANTA_CLUSTER_ID"
KILL_PATIENCE_S = 5.0
POLL_S = 0.05


def members(cluster_id: str) -> list[psutil.Process]:
    """Every other process of this user that carries the cluster's id in its environment.

    Children inherit it whatever session they start, so this finds job drivers, HAProxy and vLLM
    engines too. Ray rewrites its workers' titles; SPT_NOENV keeps it off their environment.
    """
    found = []
    for process in psutil.process_iter():
        try:
            belongs = process.environ().get(CLUSTER_ID_VARIABLE) == cluster_id
            if belongs and process.pid != os.getpid() and is_alive(process):
                found.append(process)
        except psutil.Error:
            continue  # ended meanwhile, or of another user and so not ours
    return found


def end(cluster_id: str, grace_s: float) -> list[psutil.Process]:
    """End every process of the cluster; return those that even SIGKILL could not end.

    SIGTERM first: job drivers and engines may take `grace_s` to put things away. Ray's own daemons
    would drain for longer and have nothing to save, so they are killed after it too.
    """
    _signal(members(cluster_id), signal.SIGTERM)
    if _gone_within(cluster_id, grace_s):
        return []
    deadline = time.monotonic() + KILL_PATIENCE_S
    while (left := members(cluster_id)) and time.monotonic() < deadline:
        _signal(left, signal.SIGKILL)  # again each time: one may have started another meanwhile
        time.sleep(POLL_S)
    return left


def _signal(processes: Sequence[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def is_alive(process: psutil.Process) -> bool:
    """Whether it runs. One that ended and was never collected does not: in a container, the first
    process may collect no others."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE and bool(process.is_running())
    except psutil.NoSuchProcess:
        return False


def _gone_within(cluster_id: str, timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while members(cluster_id):
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True
