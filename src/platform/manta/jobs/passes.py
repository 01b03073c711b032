"""One scheduling pass: from jobs, clusters and shares, as they are kept, to `schedule`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace

from manta.jobs import queries, shape, shares, spill
from manta.jobs.books import SLOT, Room, Running, Shares
from manta.jobs.line import Line
from manta.jobs.model import Job, JobState
from manta.jobs.schedule import Plan, schedule, why
from manta.state import State, now


def room(name: str, answers: bool, resources: Mapping[str, float], max_running: int) -> Room:
    """A cluster as the pass sees it."""
    return Room(name=name, answers=answers, capacity={**resources, SLOT: float(max_running)})


def run(
    at: float,
    line: Line,
    active: Iterable[Job],
    rooms: Mapping[str, Room],
    due: Shares,
    *,
    preempt: bool,
) -> Plan:
    """Decide who starts. Jobs of plain `ray job submit` hold no place: Manta did not give it."""
    running = _running(active)
    groups = line.groups(at)
    needs_of = {name: shape.needs(name) for name in {key[4] for key in groups}}
    plan = schedule(groups, running, rooms, due, needs_of, preempt=preempt)
    return replace(plan, expired=tuple(line.expired(at)))


def moves(
    at: float, line: Line, active: Iterable[Job], rooms: Mapping[str, Room]
) -> list[tuple[str, str, str]]:
    """Which queued jobs go to another of their clusters: (id, cluster, reason)."""
    movable = [job for job in line.movable.values() if job.not_before <= at]
    needs_of = {job.shape: shape.needs(job.shape) for job in movable}
    return spill.moves(at, movable, _running(active), rooms, needs_of)


def _running(active: Iterable[Job]) -> list[Running]:
    return [
        Running(
            id=job.id,
            seq=job.seq,
            priority=job.priority,
            user=job.user,
            team=job.team,
            cluster=job.cluster,
            needs=shape.needs(job.shape),
            leaving=bool(job.stop_reason),
        )
        for job in active
        if job.origin == "manta"
    ]


def explain(state: State, job: Job) -> str:
    """What a queued job waits for: the pass that the controller makes, on what it wrote down."""
    queued = Line(queries.waiting(state))
    active = queries.listed(state, states=(JobState.STARTING, JobState.RUNNING))
    plan = as_written(state, queued, active)
    mine = next((other for other in queued if other.id == job.id), None)
    if mine is None:
        return "it has just left the queue"
    num_before = sum(
        (-other.priority, other.seq) < (-mine.priority, mine.seq)
        for other in queued
        if other.cluster == mine.cluster
    )
    return f"{why(plan, mine, now())} ({num_before} queued jobs came before it)"


def as_written(state: State, line: Line, active: Iterable[Job]) -> Plan:
    """The pass that the controller makes, as far as what it wrote down tells."""
    rooms = {
        seen["name"]: Room(
            name=seen["name"],
            answers=seen["state"] == "up",
            capacity=json.loads(seen["resources"]),
        )
        for seen in queries.clusters_seen(state)
    }
    return run(now(), line, active, rooms, shares.load(state), preempt=False)
