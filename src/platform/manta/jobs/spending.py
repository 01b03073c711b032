"""What jobs, users and teams have cost: the nodes that were there, and who held them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import sqlalchemy as sa

from manta.jobs import metering, shape
from manta.jobs.costs import IDLE, Cost, Held, allocate
from manta.jobs.model import Job
from manta.jobs.queries import attempts_of
from manta.state import State, attempts, jobs, now

By = Literal["team", "user", "job"]


def report(
    state: State, by: By, since: float, until: float | None = None, clusters: Sequence[str] = ()
) -> dict[str, Cost]:
    """Owner → what it has cost within [since, until], UTC seconds; IDLE is among the owners.

    Args:
        state: where nodes and attempts are written down.
        by: who is an owner.
        since: from when.
        until: until when; None for now.
        clusters: ids of clusters; all if empty.
    """
    end = now() if until is None else until
    nodes = metering.read(state, since, end, clusters)
    return allocate(nodes, _held(state, by, since, end, clusters))


def of_job(state: State, job: Job) -> Cost:
    """What all attempts of the job have cost; nothing for one that has not run."""
    tries = [attempt for attempt in attempts_of(state, job.id) if attempt.started_at]
    if not tries:
        return Cost()
    since = min(attempt.started_at or 0.0 for attempt in tries)
    ends = [attempt.ended_at or now() for attempt in tries]
    clusters = sorted({attempt.cluster_id for attempt in tries})
    return report(state, "job", since, max(ends), clusters).get(job.id, Cost())


def summary(state: State, by: By, since: float) -> dict[str, Any]:
    """For programs: owners, what was idle, and both together, which is the clusters' bill."""
    parts = report(state, by, since)
    return {
        "by": by,
        "since": since,
        "owners": {owner: as_json(cost) for owner, cost in jobs_only(parts).items()},
        "idle": as_json(parts[IDLE]),
        "total": as_json(total(parts)),
        "unseen_node_seconds": metering.unseen_s(state, since),
    }


def as_json(cost: Cost) -> dict[str, Any]:
    """For programs: null where nothing is known; `partial` names sums that leave something out."""
    return {**cost.amounts(), "partial": list(cost.partial())}


def total(parts: Mapping[str, Cost]) -> Cost:
    """All together: what the clusters cost."""
    whole = Cost()
    for cost in parts.values():
        whole.add(cost)
    return whole


def jobs_only(parts: Mapping[str, Cost]) -> dict[str, Cost]:
    """Without IDLE; the dearest first."""
    mine = [(owner, cost) for owner, cost in parts.items() if owner != IDLE]
    return dict(sorted(mine, key=lambda item: (-item[1].usd, -item[1].node_s, item[0])))


def _held(state: State, by: By, since: float, until: float, clusters: Sequence[str]) -> list[Held]:
    owner = jobs.c.id if by == "job" else jobs.c[by]
    query = (
        sa.select(
            owner,
            attempts.c.cluster_id,
            jobs.c.shape,
            attempts.c.started_at,
            attempts.c.ended_at,
        )
        .join(attempts, attempts.c.job_id == jobs.c.id)
        .where(attempts.c.started_at < until)
        .where(sa.or_(attempts.c.ended_at.is_(None), attempts.c.ended_at > since))
    )
    if clusters:
        query = query.where(attempts.c.cluster_id.in_(clusters))
    with state.read() as connection:
        rows = connection.execute(query).all()
    return [
        Held(row[0], row[1], shape.needs(row[2]), max(row[3], since), min(row[4] or until, until))
        for row in rows
    ]
