"""HAProxy processes of one configuration, for tests that start some."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import psutil

from manta.cluster import haproxy


def proxies(config: Path) -> list[psutil.Process]:
    """HAProxy, its stand-ins, and who watches them: all that carry this configuration's name."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(str(config) in word for word in process.cmdline()):
                found.append(process)
    return found


def listening(config: Path) -> list[psutil.Process]:
    """HAProxy itself, not the script before it becomes that."""
    program = os.path.realpath(str(haproxy.binary()))
    found = []
    for process in proxies(config):
        with contextlib.suppress(OSError):  # not psutil's, which remembers what it was before
            if str(Path(f"/proc/{process.pid}/exe").readlink()) == program:
                found.append(process)
    return found


def end_all(config: Path) -> None:
    """Until nobody is left who would start another: all are stopped before the first is killed."""
    while left := proxies(config):
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess, psutil.TimeoutExpired):
                process.kill()
                process.wait(5)
