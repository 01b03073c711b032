"""Looks at clusters from threads, so that one that hangs holds up nothing else."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import psutil

from manta.cluster import dashboard, record
from manta.cluster.dashboard import Node
from manta.cluster.record import ClusterRecord
from manta.errors import InputError, MantaError
from manta.jobs import fits, ray_api
from manta.jobs.ray_api import RayJob

log = logging.getLogger(__name__)

BUSY_PERIOD_S = 0.25
IDLE_PERIOD_S = 1.0
RESOURCES_PERIOD_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Sight:
    """What one look at a cluster showed."""

    name: str
    begun_at: float
    """Monotonic seconds; what happened later is not in it."""
    record: ClusterRecord | None
    """None if there is none, or it was never read."""
    answers: bool
    is_gone: bool = False
    """Whether it is known to have ended: it has no record, or no processes on this machine."""
    jobs: Mapping[str, RayJob] = field(default_factory=dict)
    resources: Mapping[str, float] = field(default_factory=dict)
    """Of all nodes together, of those too that it could be scaled to."""
    resources_at: float = 0.0
    """Monotonic seconds when they were looked up."""
    nodes: tuple[Node, ...] = ()
    """What was there then, and what Ray remembers of nodes that have ended."""

    @property
    def cluster_id(self) -> str:
        """Which incarnation this is; empty if there is none."""
        return self.record.cluster_id if self.record else ""

    @property
    def status(self) -> str:
        """`up`, `gone`, or `silent`: on record, perhaps alive, and not answering."""
        return "up" if self.answers else "gone" if self.is_gone else "silent"


class Watch:
    """The newest sight of each cluster."""

    def __init__(self, pool: ThreadPoolExecutor, wake: Callable[[], None]) -> None:
        self._pool, self._wake = pool, wake
        self._looks: dict[str, Future[Sight]] = {}
        self._sights: dict[str, Sight] = {}
        self._next_at: dict[str, float] = {}

    def look(self, names: Iterable[str], busy: Iterable[str]) -> dict[str, Sight]:
        """The newest sights; looks again at those whose time has come, `busy` ones sooner.

        Args:
            names: all clusters on record, and those that someone waits for.
            busy: clusters that run something.
        """
        now, busy = time.monotonic(), set(busy)
        for name, pending in list(self._looks.items()):
            if pending.done():
                self._sights[name] = pending.result()
                period_s = BUSY_PERIOD_S if name in busy else IDLE_PERIOD_S
                self._next_at[name] = now + period_s
                del self._looks[name]
        wanted = {*names, *busy}
        for name in self._sights.keys() - wanted:  # its record is gone: what was seen no longer is
            self._sights[name] = Sight(
                name=name, begun_at=now, record=None, answers=False, is_gone=True
            )
        for name in wanted:
            if name in busy:
                soon = now + BUSY_PERIOD_S
                self._next_at[name] = min(self._next_at.get(name, 0.0), soon)
            if name not in self._looks and now >= self._next_at.get(name, 0.0):
                pending = self._pool.submit(_look_safely, name, self._sights.get(name))
                pending.add_done_callback(lambda _: self._wake())
                self._looks[name] = pending
        return self._sights


def _look_safely(name: str, before: Sight | None) -> Sight:
    begun_at = time.monotonic()
    try:
        return _look(name, before)
    except Exception:  # an answer that nobody foresaw: as good as none
        log.exception("cluster %s", name)
        return _silent(name, begun_at, before)


def _look(name: str, before: Sight | None) -> Sight:
    begun_at = time.monotonic()
    try:
        found = record.find(name)
    except InputError:
        return Sight(name=name, begun_at=begun_at, record=None, answers=False, is_gone=True)
    except (MantaError, OSError, ValueError):  # no tunnel to it, or its record is half written
        return _silent(name, begun_at, before)
    try:
        jobs = {job.submission_id: job for job in ray_api.list_all(found)}
        resources, resources_at, nodes = _resources(found, before, begun_at)
    except MantaError:
        dead = found.is_here and found.pid > 0 and not _is_alive(found.pid)
        return Sight(name=name, begun_at=begun_at, record=found, answers=False, is_gone=dead)
    return Sight(
        name=name,
        begun_at=begun_at,
        record=found,
        answers=True,
        jobs=jobs,
        resources=resources,
        resources_at=resources_at,
        nodes=nodes,
    )


def _silent(name: str, begun_at: float, before: Sight | None) -> Sight:
    known = before.record if before else None
    return Sight(name=name, begun_at=begun_at, record=known, answers=False)


def _resources(
    found: ClusterRecord, before: Sight | None, now: float
) -> tuple[Mapping[str, float], float, tuple[Node, ...]]:
    """What it has or can grow to, and when that was looked up: nodes come and go slowly."""
    if before is None or before.cluster_id != found.cluster_id:
        before = None
    elif now < before.resources_at + RESOURCES_PERIOD_S:
        return before.resources, before.resources_at, before.nodes
    try:
        nodes = dashboard.nodes(found)
        return fits.capacity(found, nodes), now, tuple(nodes)
    except MantaError as error:  # another API than that of jobs: no reason to call it silent
        log.info("%s", error)
        return (before.resources, before.resources_at, before.nodes) if before else ({}, 0.0, ())


def _is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
