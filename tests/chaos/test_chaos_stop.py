"""A job that does all it can to stay: `manta stop` ends it with everything that it started."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest
from arena import Arena
from terminal import MANTA, until

STUBBORN = """
import os, signal, sys, time
folder, kind = sys.argv[1:]

def stay(name):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with open(f"{folder}/{name}", "w") as file:
        file.write(str(os.getpid()))
    while True:
        time.sleep(1)

def daemon(name):
    if os.fork() == 0:
        os.setsid()
        if os.fork():
            os._exit(0)
        os.closerange(0, 256)
        stay(name)

def child(name):
    if os.fork() == 0:
        stay(name)

child("child")
daemon("daemon")
if kind == "ray":
    import ray
    ray.init(log_to_driver=False)
    @ray.remote(num_cpus=0)
    def task():
        child("child-of-task")
        daemon("daemon-of-task")
        time.sleep(600)
    task.remote()
stay("driver")
"""
MEMBERS = {
    "plain": {"driver", "child", "daemon"},
    "ray": {"driver", "child", "daemon", "child-of-task", "daemon-of-task"},
}


@pytest.mark.timeout(300)
def test_what_forks_and_ignores_the_signal_is_really_gone(arena: Arena, tmp_path: Path) -> None:
    (tmp_path / "stubborn.py").write_text(STUBBORN)
    for kind in MEMBERS:
        (tmp_path / kind).mkdir()
        arena.submit(kind, f"exec python {tmp_path}/stubborn.py {tmp_path}/{kind} {kind}")
    arena.work()
    pids = {}
    for kind, names in MEMBERS.items():
        until(lambda k=kind, n=names: _named(tmp_path / k).keys() >= n, f"{kind} has forked", 60)
        pids |= {f"{kind}/{name}": pid for name, pid in _named(tmp_path / kind).items()}
    assert [name for name, pid in pids.items() if not _lives(pid)] == []
    begun = time.monotonic()
    for kind in MEMBERS:
        arena.terminal(MANTA, "stop", kind)
    took_s = time.monotonic() - begun
    left = [name for name, pid in pids.items() if _lives(pid)]
    tally = arena.tally(MEMBERS)
    print(
        f"\n{len(pids)} processes ignored SIGTERM, {len(left)} left after {took_s:.1f} s; {tally}"
    )
    assert left == []
    assert tally.ended == {"STOPPED": len(MEMBERS)}


def _named(folder: Path) -> dict[str, int]:
    texts = {file.name: file.read_text() for file in folder.iterdir()}
    return {name: int(text) for name, text in texts.items() if text}


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
