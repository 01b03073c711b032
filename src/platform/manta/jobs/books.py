"""What is held by whom, and reserved for whom, while a scheduling pass goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

SLOT = "slot"
"""One for each running job: its driver process on the head."""

MAX_RUNNING = 16
"""Jobs of one cluster at a time: each is a driver process on its head."""

Needs = tuple[tuple[str, float], ...]
"""Resource and amount, sorted by resource; always with a SLOT."""


class Waiting(NamedTuple):
    """A queued job, as much of it as the pass looks at: there may be very many."""

    id: str
    seq: int
    version: int
    priority: int
    user: str
    team: str
    cluster: str
    shape: str
    not_before: float
    deadline_at: float | None
    clusters: str
    spill_after_s: float
    queued_at: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Running:
    """A job that holds its place on a cluster."""

    id: str
    seq: int
    priority: int
    user: str
    team: str
    cluster: str
    needs: Needs
    leaving: bool = False
    """Whether it was told to end; it holds its place until it has."""


@dataclass(frozen=True, kw_only=True)
class Room:
    """A cluster: whether it answers, and what it has, or can be scaled to, in all."""

    name: str
    answers: bool
    capacity: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Share:
    """What a team or user is due, and may hold at most."""

    weight: float = 1.0
    limits: Mapping[str, float] = field(default_factory=dict)
    """Resource → most that it may hold at once, over all clusters; SLOT limits the jobs."""


@dataclass(frozen=True, kw_only=True)
class Shares:
    """All shares; who is not named has the default one."""

    teams: Mapping[str, Share] = field(default_factory=dict)
    users: Mapping[str, Share] = field(default_factory=dict)
    held: Mapping[str, str] = field(default_factory=dict)
    """Team → why none of its jobs may start: its budget is spent."""


Key = tuple[int, str, str, str, str]
"""A group of queued jobs that are alike to a pass: priority, team, user, cluster, shape."""

_EPSILON = 1e-9
_DEFAULT = Share()


class Books:
    """The account of one pass; all that changes in it is here."""

    def __init__(
        self, rooms: Mapping[str, Room], running: Sequence[Running], shares: Shares
    ) -> None:
        self.rooms = rooms
        self.starts: list[str] = []
        self.preempts: list[tuple[str, str]] = []
        self.blocked: dict[tuple[str, str], str] = {}
        self.over_quota: dict[Key, str] = {}
        self.reserved: dict[str, tuple[Waiting, Needs]] = {}
        self._shares = shares
        self._running: list[Running] = []
        self._held: dict[str, dict[str, float]] = {}
        self._held_by: dict[tuple[str, str], dict[str, float]] = {}
        self._part: dict[tuple[str, str, str, str], float] = {}
        self._dominant: dict[tuple[str, str], float] = {}
        for job in running:
            self._hold(job)

    def start(self, job: Waiting, needs: Needs) -> None:
        """The job starts and holds its place."""
        self.starts.append(job.id)
        self._hold(
            Running(
                id=job.id,
                seq=job.seq,
                priority=job.priority,
                user=job.user,
                team=job.team,
                cluster=job.cluster,
                needs=needs,
            )
        )

    def rank(self, team: str, user: str) -> tuple[float, float]:
        """How much team and user hold for their weights; less goes first."""
        of_team = self._shares.teams.get(team, _DEFAULT).weight
        of_user = self._shares.users.get(user, _DEFAULT).weight
        return (
            self._dominant.get(("team", team), 0.0) / of_team,
            self._dominant.get(("user", user), 0.0) / of_user,
        )

    def impossible(self, cluster: str, needs: Needs) -> str:
        """Why the cluster could not run it even if it were empty; empty if it could."""
        capacity = self.rooms[cluster].capacity
        for resource, amount in needs:
            if amount > capacity.get(resource, 0.0) + _EPSILON:
                most = capacity.get(resource, 0.0)
                return f"it needs {resource}: {amount:g}; cluster `{cluster}` has {most:g} in all"
        return ""

    def over_limit(self, job: Waiting, needs: Needs) -> str:
        """Which quota the job would break, or what holds its team; empty if nothing."""
        if job.team in self._shares.held:
            return self._shares.held[job.team]
        owners = (("team", job.team, self._shares.teams), ("user", job.user, self._shares.users))
        for kind, name, shares in owners:
            limits = shares.get(name, _DEFAULT).limits
            held = self._held_by.get((kind, name), {})
            for resource, amount in needs:
                limit = limits.get(resource)
                if limit is not None and held.get(resource, 0.0) + amount > limit + _EPSILON:
                    what = "jobs" if resource == SLOT else resource
                    return f"{kind} {name} is at its quota of {limit:g} {what}"
        return ""

    def lacking(self, cluster: str, needs: Needs) -> str:
        """Which resource is not free now; empty if all are."""
        for resource, amount in needs:
            if self._free(cluster, resource) + _EPSILON < amount:
                return resource
        return ""

    def reserve(self, job: Waiting, needs: Needs) -> bool:
        """Keep a place for the first job that does not fit; returns whether this is it."""
        return self.reserved.setdefault(job.cluster, (job, needs))[0].id == job.id

    def in_the_way(self, job: Waiting, needs: Needs) -> str:
        """Id of the reserved job that this one, overtaking it, could delay; empty if none."""
        if job.cluster not in self.reserved:
            return ""
        first, reserved = self.reserved[job.cluster]
        overtaking = dict(needs)
        for other in self._running:
            if other.cluster == job.cluster and _is_after(other, first):
                for resource, amount in other.needs:
                    overtaking[resource] = overtaking.get(resource, 0.0) + amount
        capacity = self.rooms[job.cluster].capacity
        for resource, amount in reserved:
            if overtaking.get(resource, 0.0) + amount > capacity.get(resource, 0.0) + _EPSILON:
                return first.id
        return ""

    def make_room(self, job: Waiting, needs: Needs) -> bool:
        """Choose jobs of lower bands whose end lets this one start: lowest first, then newest.

        Returns whether there are such, or enough have been told to leave already. Whoever leaves
        holds its place until it has ended.
        """
        here = [other for other in self._running if other.cluster == job.cluster]
        free = {resource: self._free(job.cluster, resource) for resource, _ in needs}
        for leaving in (other for other in here if other.leaving):
            _add(free, leaving.needs)
        chosen = []
        for other in sorted(here, key=lambda other: (other.priority, -other.seq)):
            lacking = {r for r, amount in needs if free[r] + _EPSILON < amount}
            if not lacking:
                break
            is_below = other.priority < job.priority and not other.leaving
            if is_below and other.id not in self.starts and lacking & {r for r, _ in other.needs}:
                chosen.append(other)
                _add(free, other.needs)
        if any(free[r] + _EPSILON < amount for r, amount in needs):
            return False
        self.preempts += [(other.id, job.id) for other in chosen]
        gone = {other.id for other in chosen}
        self._running = [replace(r, leaving=r.leaving or r.id in gone) for r in self._running]
        return True

    def _free(self, cluster: str, resource: str) -> float:
        capacity = self.rooms[cluster].capacity.get(resource, 0.0)
        return capacity - self._held.get(cluster, {}).get(resource, 0.0)

    def _hold(self, job: Running) -> None:
        self._running.append(job)
        _add(self._held.setdefault(job.cluster, {}), job.needs)
        room = self.rooms.get(job.cluster)
        for owner in (("team", job.team), ("user", job.user)):
            _add(self._held_by.setdefault(owner, {}), job.needs)
            for resource, amount in job.needs:
                whole = room.capacity.get(resource, 0.0) if room else 0.0
                place = (*owner, job.cluster, resource)
                self._part[place] = self._part.get(place, 0.0) + (amount / whole if whole else 0)
                self._dominant[owner] = max(self._dominant.get(owner, 0.0), self._part[place])


def _is_after(other: Running, first: Waiting) -> bool:
    return (-other.priority, other.seq) > (-first.priority, first.seq)


def _add(amounts: dict[str, float], needs: Needs) -> None:
    for resource, amount in needs:
        amounts[resource] = amounts.get(resource, 0.0) + amount
