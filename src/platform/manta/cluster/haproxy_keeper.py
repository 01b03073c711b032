"""Stands by one HAProxy: should it be killed, another takes its place within a moment.

Ray finds out by looking, some seconds later, and then starts its manager of HAProxy and with it
HAProxy anew; until then nobody would answer. The script of `haproxy.py` starts this file beside
each HAProxy, by its path and without the rest of the package:

    python -I -S haproxy_keeper.py keep PID SCRIPT --config=FILE     wait, and stand in if need be
    python -I -S haproxy_keeper.py older --config=FILE               pids that a new one replaces

A stand-in has the configuration of the one that died, but not its admin socket: so Ray still sees
that its own is gone. The HAProxy that Ray starts then takes over as soon as it knows of
applications. Targets that change meanwhile are not told to a stand-in; those that are gone fail
its own checks.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time
from pathlib import Path

STAND_IN = ".stand-in"
"""Added to the configuration's name; the script puts there what the last one ran with."""
STAND_IN_LIFE_S = 300.0
"""After that nobody is coming to replace it: Serve was shut down."""
SHORT_LIFE_S = 1.0
"""One that ends sooner did not start, for example since its port is not free yet."""
MAX_TRIES = 8
TRIES_VARIABLE = "MANTA_HAPROXY_TRIES"


def main(words: list[str]) -> None:
    """One of the two commands above."""
    config = words[-1].removeprefix("--config=").removesuffix(STAND_IN)
    if words[0] == "older":
        print(*_running(config, ready=True))
    else:
        os.setsid()  # Ray ends the process group of a worker that died
        _keep(int(words[1]), words[2], config, words[-1].endswith(STAND_IN))


def _keep(pid: int, script: str, config: str, is_stand_in: bool) -> None:
    """Return when HAProxy `pid` has ended and another is there; else become its stand-in."""
    began, started_at = time.monotonic(), _started_at(pid)
    if not _ends(pid, STAND_IN_LIFE_S if is_stand_in else None):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGUSR1)  # answer what is open, then end
        return
    tries = 0
    if time.monotonic() - began < SHORT_LIFE_S:
        tries = int(os.environ.get(TRIES_VARIABLE, "0")) + 1
        if tries > MAX_TRIES:
            return
        time.sleep(0.02 * 2**tries)
    others = set(_running(config)) - _idle(config)
    if any(_started_at(other) > started_at for other in others):
        return
    os.environ[TRIES_VARIABLE] = str(tries)
    os.execv(script, [script, "-db", "-f", config + STAND_IN])


def _ends(pid: int, timeout_s: float | None) -> bool:
    """Wait for a process, which need not be a child; whether it ended in time."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    return bool(poll.poll(None if timeout_s is None else 1000 * timeout_s))


def _running(config: str, *, ready: bool = False) -> list[int]:
    """Every HAProxy with this configuration; unless `ready`, also the script that becomes one."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            is_ready = len(words) > 1 and words[1] == "-db"
            if {config, config + STAND_IN} & set(words) and (is_ready or not ready):
                found.append(int(folder.name))
    return found


def _idle(config: str) -> set[int]:
    """Those that wait to hear of applications, and answer nobody; the script notes them."""
    try:
        return set(map(int, Path(config + ".idle").read_text().split()))
    except OSError:
        return set()


def _started_at(pid: int) -> int:
    """In clock ticks since the machine started; 0 if it has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    return int(stat.rpartition(")")[2].split()[19])


if __name__ == "__main__":
    main(sys.argv[1:])
