"""Who goes next. Pure: the same queue, clusters and shares give the same answer.

In order of precedence:

1. Bands. A job of a higher priority goes before all of a lower one.
2. Fair shares. Within a band the team that holds the least, measured by its dominant resource over
   its weight (DRF; Ghodsi et al., NSDI 2011), goes first; within a team the user.
3. First in, first out.
4. Gangs. A job starts when all that it needs fits, never with a part of it.
5. Back-fill. The first job that does not fit is reserved its place: who comes after it may start
   if, together with all who overtook it and still run, it leaves that place free. So what ends,
   ends for the reserved job, and nothing that overtakes it can delay it.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from manta.jobs.books import SLOT, Books, Key, Needs, Room, Running, Shares, Waiting
from manta.jobs.line import key_of


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one pass decided."""

    starts: tuple[str, ...] = ()
    """Ids, in the order in which they start."""
    expired: tuple[str, ...] = ()
    """Ids of jobs whose deadline has passed."""
    preempts: tuple[tuple[str, str], ...] = ()
    """(id of a running job to stop and requeue, id of the job that it makes room for)."""
    blocked: Mapping[tuple[str, str], str] = field(default_factory=dict)
    """Why nothing more of a shape starts on a cluster: (cluster, shape) → words."""
    over_quota: Mapping[Key, str] = field(default_factory=dict)
    """Why a group waits whose owner may hold no more."""
    first: Mapping[str, str] = field(default_factory=dict)
    """Cluster → id of the job that its place is reserved for."""


def schedule(
    groups: Mapping[Key, Mapping[str, Waiting]],
    running: Sequence[Running],
    rooms: Mapping[str, Room],
    shares: Shares,
    needs_of: Mapping[str, Needs],
    *,
    preempt: bool = False,
) -> Plan:
    """Decide which queued jobs start now.

    Args:
        groups: jobs that may start, each group in the order of arrival; see `Line.groups`.
        running: what holds its place, on all clusters.
        rooms: clusters by name.
        shares: weights and limits of teams and users.
        needs_of: what each shape that occurs asks for.
        preempt: whether running jobs of a lower band make room for one of a higher.
    """
    books = Books(rooms, running, shares)
    for band in sorted({key[0] for key in groups}, reverse=True):
        _fill([key for key in groups if key[0] == band], groups, books, needs_of, preempt)
    return Plan(
        starts=tuple(books.starts),
        preempts=tuple(books.preempts),
        blocked=books.blocked,
        over_quota=books.over_quota,
        first={cluster: job.id for cluster, (job, _) in books.reserved.items()},
    )


def why(plan: Plan, job: Waiting, now: float) -> str:
    """What a queued job waits for, as the pass that gave `plan` saw it."""
    if job.not_before > now:
        return f"its next try is in {job.not_before - now:.0f} s"
    if job.id in {for_id for _, for_id in plan.preempts}:
        return "jobs of a lower priority are being stopped to make room for it"
    if plan.first.get(job.cluster) == job.id:
        return f"{plan.blocked[job.cluster, job.shape]}; it is the next in line there"
    return (
        plan.over_quota.get(key_of(job))
        or plan.blocked.get((job.cluster, job.shape))
        or "it is its turn: it starts with the next pass"
    )


def _fill(
    keys: Sequence[Key],
    groups: Mapping[Key, Mapping[str, Waiting]],
    books: Books,
    needs_of: Mapping[str, Needs],
    preempt: bool,
) -> None:
    """Start what can be started of one band.

    What holds up one job holds up all of its shape on its cluster, for the rest of the pass: room
    only gets less. So a pass costs little more than what it starts, however long the queue is.
    """
    rest = {key: iter(groups[key].values()) for key in keys}
    heads: dict[tuple[str, str], list[tuple[int, Key, Waiting]]] = {}
    for key in keys:
        job = next(rest[key])
        heads.setdefault((key[1], key[2]), []).append((job.seq, key, job))
    for mine in heads.values():
        mine.sort()
    line = [(books.rank(*owner), mine[0][0], owner) for owner, mine in heads.items()]
    heapq.heapify(line)
    hopeful = {(key[3], key[4]) for key in keys} - books.blocked.keys()
    while line and hopeful:
        rank, seq, owner = heapq.heappop(line)
        mine = heads[owner]
        while mine and mine[0][1][3:] not in hopeful:
            heapq.heappop(mine)
        if not mine:
            continue
        current = books.rank(*owner)
        if (current, mine[0][0]) != (rank, seq):  # changed since: back into the line
            heapq.heappush(line, (current, mine[0][0], owner))
            continue
        _, key, job = heapq.heappop(mine)
        # Quotas first: who may not have a place must not have it reserved.
        if obstacle := books.over_limit(job, needs_of[job.shape]):
            books.over_quota[key] = obstacle
        elif obstacle := _obstacle(job, needs_of[job.shape], books, preempt):
            books.blocked[job.cluster, job.shape] = obstacle
            hopeful.discard((job.cluster, job.shape))
        else:
            books.start(job, needs_of[job.shape])
            if (following := next(rest[key], None)) is not None:
                heapq.heappush(mine, (following.seq, key, following))
        if mine:
            heapq.heappush(line, (books.rank(*owner), mine[0][0], owner))


def _obstacle(job: Waiting, needs: Needs, books: Books, preempt: bool) -> str:
    """What holds up jobs of this shape on this cluster; empty if nothing does.

    The first that only lacks room is reserved its place.
    """
    room = books.rooms.get(job.cluster)
    if room is None or not room.answers:
        return f"cluster `{job.cluster}` is not up"
    if reason := books.impossible(job.cluster, needs):
        return reason
    if resource := books.lacking(job.cluster, needs):
        if books.reserve(job, needs) and preempt:
            books.make_room(job, needs)
        what = "place for another job" if resource == SLOT else f"{resource} free"
        return f"cluster `{job.cluster}` has not enough {what}"
    if first := books.in_the_way(job, needs):
        return f"it would delay job {first}, whose turn is before"
    return ""
