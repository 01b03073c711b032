"""One change of a cluster's applications at a time, from whatever machine.

    deploys/CLUSTER/lock/000012.json        who took it; written once, and by one only
    deploys/CLUSTER/lock/000012.beat.json   rewritten by the holder while it lives
    deploys/CLUSTER/lock/000012.end.json    given back

It lies in the storage, which everybody who changes this cluster shares: the cluster's REST API
can write no such place, and who is at work must be known when its head hangs. The highest
number is the lock. Clocks are not compared to judge a holder dead: its beat has to stand still
for TTL_S of the *asker's* time. So a holder that was killed elsewhere keeps others out for at
most 2 × TTL_S; one that was killed on this machine, not at all.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from manta import storage
from manta.cluster.record import ClusterRecord
from manta.errors import MantaError
from manta.serving.apps import places
from manta.serving.apps.beat import beating

TTL_S = 15.0
"""A holder whose beat stands still for so long is dead."""
BEAT_S = 3.0
_POLL_S = 0.5
_NUM_KEPT = 20
_NAME = re.compile(r"(\d+)(\.end|\.beat)?\.json")


class LockLost(MantaError):
    """Somebody else has taken over; this process must not change anything any more."""


@dataclass(frozen=True, kw_only=True)
class Lock:
    """The right to change the applications of a cluster."""

    folder: str
    number: int

    def check(self) -> None:
        """Call right before each change. Raises LockLost if another has taken over."""
        newest, _ = _newest(self.folder)
        if newest != self.number:
            raise LockLost(
                "another deploy has taken over, since this one was silent for too long; "
                "it changes nothing any more",
                "see `manta apps history`",
            )


@contextlib.contextmanager
def held(
    cluster: ClusterRecord, doing: str, say: Callable[[str], None], ttl_s: float = TTL_S
) -> Iterator[Lock]:
    """Hold the lock of a cluster during the block.

    Args:
        cluster: whose applications will be changed.
        doing: a few words for those who find it taken.
        say: told if the holder seems dead and is watched for `ttl_s`.
        ttl_s: as TTL_S.

    Raises:
        MantaError: somebody holds it, or the storage cannot be written.
    """
    lock = _acquire(places.lock(cluster), doing, say, ttl_s)
    try:
        with beating(lambda: _write_time(lock, ".beat"), BEAT_S, patience_s=5):
            yield lock
    finally:
        # Whatever fails here: its beat has ended, so the lock frees itself.
        with contextlib.suppress(MantaError):
            _write_time(lock, ".end")


class Taken(MantaError):
    """Another deploy is at work on the cluster."""


def _acquire(folder: str, doing: str, say: Callable[[str], None], ttl_s: float) -> Lock:
    newest, has_ended = _newest(folder)
    if newest and not has_ended:
        _require_dead(folder, newest, say, ttl_s)
    lock = Lock(folder=folder, number=newest + 1)
    mine = {
        "id": uuid.uuid4().hex,
        "doing": doing,
        "by": f"{getpass.getuser()}@{socket.gethostname()}",
        "process": _me(),
        "at": time.time(),
    }
    storage.write_new(_file(folder, lock.number), mine)
    # Read back: an answer of the storage may have been lost, or it may not know conditional puts.
    if (taken := storage.read_json(_file(folder, lock.number))) != mine:
        raise _taken(taken)
    lock.check()
    _forget_old(folder, lock.number)
    return lock


def _require_dead(folder: str, number: int, say: Callable[[str], None], ttl_s: float) -> None:
    """Return once the holder is known to be dead; raise MantaError if it lives."""
    holder = storage.read_json(_file(folder, number))
    if _is_dead(holder["process"]):
        return
    beat = _last_beat(folder, number) or holder["at"]
    if 0 <= time.time() - beat < ttl_s:
        raise _taken(holder)
    say(f"{_who(holder)} but seems dead; watching it for {ttl_s:g} s")
    deadline = time.monotonic() + ttl_s
    while time.monotonic() < deadline:
        time.sleep(_POLL_S)
        if (_last_beat(folder, number) or holder["at"]) != beat:
            raise _taken(holder)


def _taken(holder: dict[str, Any]) -> Taken:
    return Taken(
        f"{_who(holder)}",
        "wait until it is done; see `manta apps history`",
    )


def _who(holder: dict[str, Any]) -> str:
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(holder["at"]))
    return f"{holder['by']} has been changing this cluster since {since} UTC ({holder['doing']})"


def _write_time(lock: Lock, kind: str) -> None:
    storage.write_json(_file(lock.folder, lock.number, kind), {"at": time.time()})


def _last_beat(folder: str, number: int) -> float | None:
    url = _file(folder, number, ".beat")
    return float(storage.read_json(url)["at"]) if storage.exists(url) else None


def _newest(folder: str) -> tuple[int, bool]:
    """The highest number, 0 if there is none, and whether that one was given back."""
    found = _numbers(folder)
    newest = max((number for number, _ in found), default=0)
    return newest, (newest, ".end") in found


def _numbers(folder: str) -> list[tuple[int, str]]:
    names = (url.rpartition("/")[2] for url in storage.glob(storage.join(folder, "*")))
    matches = (_NAME.fullmatch(name) for name in names)
    return [(int(match[1]), match[2] or "") for match in matches if match]


def _forget_old(folder: str, number: int) -> None:
    for old, kind in _numbers(folder):
        if old <= number - _NUM_KEPT:
            storage.delete(_file(folder, old, kind))


def _file(folder: str, number: int, kind: str = "") -> str:
    return storage.join(folder, f"{number:06}{kind}.json")


def _me() -> list[Any]:
    return [_host(), os.getpid(), psutil.Process().create_time()]


def _host() -> str:
    """This machine and process namespace: a pid means nothing in another."""
    namespace = Path("/proc/self/ns/pid")
    inode = namespace.stat().st_ino if namespace.exists() else 0
    return f"{socket.gethostname()}/{inode}"


def _is_dead(process: list[Any]) -> bool:
    """Whether a holder is known to have ended; False if that cannot be known from here."""
    host, pid, started = process
    if host != _host():
        return False
    try:
        found = psutil.Process(pid)
        return abs(found.create_time() - started) > 1 or found.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
