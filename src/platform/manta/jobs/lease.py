"""One controller at a time: a lease with an expiry, and a token that each of its writes shows.

The expiry decides who may *begin* to act; the token decides whose writes count. A controller that
was asleep past its expiry (a suspended laptop, a stepped clock) finds its token outdated in the
very transaction in which it would have written.

Expiries are told by the database's clock, so that those of the machines need not agree. If that
clock steps, one that waits may take over from one that works, which ends; nobody waits for long.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import sqlalchemy as sa

from manta.errors import MantaError
from manta.state import State, clock, leases

NAME = "controller"
TTL_S = 15.0
RENEW_S = 3.0
MAX_AHEAD_S = 2 * TTL_S
"""An expiry further ahead than this is of a clock that has been put back since."""


class LeaseLost(MantaError):
    """Another controller has taken over; this one must not act any more."""


@dataclass(frozen=True, kw_only=True)
class Lease:
    """The right to act."""

    holder: str
    token: int

    def check(self, connection: sa.Connection) -> None:
        """Raise LeaseLost unless the lease is still this one. Call first in each write."""
        query = sa.select(leases.c.token).where(leases.c.name == NAME)
        if connection.execute(query).scalar() != self.token:
            raise LeaseLost("another controller has the lease")

    def renew(self, state: State) -> None:
        """Push the expiry out. Raises LeaseLost."""
        with state.write() as connection:
            self.check(connection)
            _set(connection, expires_at=clock(connection) + TTL_S)

    def release(self, state: State) -> None:
        """Let the next one in at once."""
        with state.write() as connection:
            self.check(connection)
            _set(connection, expires_at=0.0)


def acquire(state: State) -> Lease | None:
    """Take the lease if it is free, expired, or its holder on this machine is dead."""
    me = _me()
    with state.write() as connection:
        row = connection.execute(sa.select(leases).where(leases.c.name == NAME)).one_or_none()
        at = clock(connection)
        if row is None:
            connection.execute(
                leases.insert().values(name=NAME, holder=me, token=1, expires_at=at + TTL_S)
            )
            return Lease(holder=me, token=1)
        if _is_good(row, at):
            return None
        _set(connection, holder=me, token=row.token + 1, expires_at=at + TTL_S)
        return Lease(holder=me, token=row.token + 1)


def holder(state: State) -> str | None:
    """Who holds the lease now; None if nobody does."""
    with state.read() as connection:
        row = connection.execute(sa.select(leases).where(leases.c.name == NAME)).one_or_none()
        at = clock(connection)
    return str(row.holder) if row is not None and _is_good(row, at) else None


def _is_good(row: sa.Row[Any], at: float) -> bool:
    return at < row.expires_at <= at + MAX_AHEAD_S and not _is_dead(row.holder)


def _set(connection: sa.Connection, **values: object) -> None:
    connection.execute(leases.update().where(leases.c.name == NAME).values(**values))


def _me() -> str:
    return f"{_host()} {os.getpid()} {_started(psutil.Process())}"


def _host() -> str:
    """This machine and process namespace: a pid means nothing in another."""
    namespace = Path("/proc/self/ns/pid")
    inode = namespace.stat().st_ino if namespace.exists() else 0
    return f"{socket.gethostname()}/{inode}"


def _is_dead(holder: str) -> bool:
    """Whether the holder is known to have ended; False if it cannot be known from here."""
    host, pid, started = holder.split(" ")
    if host != _host():
        return False
    try:
        process = psutil.Process(int(pid))
        return _started(process) != started or process.status() == "zombie"
    except psutil.NoSuchProcess:
        return True


def _started(process: psutil.Process) -> str:
    """What tells a process from a later one of the same number.

    On Linux in ticks since boot: the time of day at which a process began changes with the clock.
    """
    try:
        return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return f"{process.create_time():.2f}"
