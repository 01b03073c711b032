"""What jobs have held, and for how long: resource-hours by team, user or job.

Held is what the job asked for, as the scheduling pass counts it, from the start of each attempt to
its end. It is no bill: what that cost of the nodes there were is in `spending`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import sqlalchemy as sa

from manta.jobs import shape
from manta.jobs.books import SLOT
from manta.state import State, attempts, jobs, now

By = Literal["team", "user", "job"]
HOUR_S = 3600.0


class Run(NamedTuple):
    """One attempt that ran."""

    owner: str
    shape: str
    started_at: float
    ended_at: float | None
    failed: bool


@dataclass(kw_only=True)
class Usage:
    """What one owner has held."""

    num_attempts: int = 0
    hours: float = 0.0
    """Of running, all attempts together."""
    resource_hours: dict[str, float] = field(default_factory=dict)
    """Resource → amount × hours."""
    failed_hours: float = 0.0
    """Of attempts that failed; part of `hours`."""


def report(state: State, by: By, since: float) -> dict[str, Usage]:
    """Owner → what its jobs have held since `since`, UTC seconds; what still runs, until now."""
    owner = jobs.c.id if by == "job" else jobs.c[by]
    query = (
        sa.select(
            owner, jobs.c.shape, attempts.c.started_at, attempts.c.ended_at, attempts.c.cause
        )
        .join(attempts, attempts.c.job_id == jobs.c.id)
        .where(attempts.c.started_at.is_not(None))
        .where(sa.or_(attempts.c.ended_at.is_(None), attempts.c.ended_at > since))
    )
    with state.read() as connection:
        rows = connection.execute(query).all()
    runs = (Run(row[0], row[1], row[2], row[3], bool(row[4])) for row in rows)
    return add_up(runs, since, now())


def add_up(runs: Iterable[Run], since: float, until: float) -> dict[str, Usage]:
    """The sum of all runs within [since, until], by owner, the largest first."""
    found: dict[str, Usage] = {}
    for run in runs:
        end = until if run.ended_at is None else min(run.ended_at, until)
        hours = max(0.0, end - max(run.started_at, since)) / HOUR_S
        usage = found.setdefault(run.owner, Usage())
        usage.num_attempts += 1
        usage.hours += hours
        usage.failed_hours += hours if run.failed else 0.0
        for resource, amount in shape.needs(run.shape):
            if resource != SLOT:
                held = usage.resource_hours.get(resource, 0.0)
                usage.resource_hours[resource] = held + amount * hours
    return dict(sorted(found.items(), key=lambda item: -item[1].hours))
