"""Pipeline runs in the state, for those who look on: steps, their needs, how far they are.

The record that a run is resumed from lies in storage (`pipeline.py`). This one is what the queue's
controller can show without reading anybody's storage.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from manta.jobs import queries
from manta.plan.jobs import JobPlan, RunPlan, StepPlan
from manta.state import State, events, jobs, now, runs

if TYPE_CHECKING:
    from manta.jobs.pipeline import StepResult

NOT_STARTED = ""


@dataclass(frozen=True, kw_only=True)
class RunStep:
    """One step of a run. Times are UTC seconds; None where not known."""

    name: str
    needs: tuple[str, ...]
    job_id: str | None
    """None for a deploy. The job exists only when the step has begun."""
    state: str
    """A job's state; empty if the step has no job yet, or is a deploy that has not ended."""
    message: str
    started_at: float | None
    ended_at: float | None


@dataclass(frozen=True, kw_only=True)
class Run:
    """A pipeline run with its steps, in the order in which they run."""

    id: str
    seq: int
    pipeline: str
    actor: str
    started_at: float
    steps: tuple[RunStep, ...]


def note(state: State, plan: RunPlan, results: Sequence[StepResult], actor: str) -> None:
    """Write down the run, new or as far as it is; a new one and a step's end are events too."""
    ended = {result.name: result for result in results}
    steps = json.dumps([_told(step, ended.get(step.name)) for step in plan.steps])
    said = {"at": now(), "actor": actor, "job_id": "", "cluster": ""}
    with state.write() as connection:
        known = runs.update().where(runs.c.id == plan.run_id).values(steps=steps)
        if connection.execute(known).rowcount:
            kind, text = "run", plan.run_id
            if results:
                text += f": step {results[-1].name} {results[-1].status.lower()}"
        else:
            row = {"id": plan.run_id, "pipeline": plan.pipeline, "actor": actor, "steps": steps}
            connection.execute(runs.insert().values(**row, started_at=said["at"]))
            kind, text = "run began", plan.run_id
        connection.execute(events.insert().values(**said, kind=kind, text=text))


def listed(state: State, limit: int, before_seq: int | None = None) -> list[Run]:
    """The newest runs, newest first, each step as its job is now."""
    query = sa.select(runs).order_by(runs.c.seq.desc()).limit(limit)
    if before_seq is not None:
        query = query.where(runs.c.seq < before_seq)
    with state.read() as connection:
        rows = connection.execute(query).all()
        told = {row.id: json.loads(row.steps) for row in rows}
        ids = [step["job_id"] for steps in told.values() for step in steps if step["job_id"]]
        known = _jobs(connection, ids)
    return [
        Run(
            id=row.id,
            seq=row.seq,
            pipeline=row.pipeline,
            actor=row.actor,
            started_at=row.started_at,
            steps=tuple(_step(step, known.get(step["job_id"])) for step in told[row.id]),
        )
        for row in rows
    ]


def _told(step: StepPlan, result: StepResult | None) -> dict[str, Any]:
    own = step.action.submission_id if isinstance(step.action, JobPlan) else None
    return {
        "name": step.name,
        "needs": list(step.needs),
        # A step that has not changed shows the job of the earlier run that did it.
        "job_id": result.submission_id if result and result.submission_id else own,
        "status": result.status if result else NOT_STARTED,
        "message": result.message if result else "",
    }


def _jobs(connection: sa.Connection, ids: Sequence[str]) -> dict[str, sa.Row[Any]]:
    columns = [jobs.c[name] for name in ("id", "state", "message", "started_at", "ended_at")]
    found: dict[str, sa.Row[Any]] = {}
    for start in range(0, len(ids), queries.CHUNK):
        chosen = jobs.c.id.in_(ids[start : start + queries.CHUNK])
        found |= {row.id: row for row in connection.execute(sa.select(*columns).where(chosen))}
    return found


def _step(told: dict[str, Any], job: sa.Row[Any] | None) -> RunStep:
    """The job tells what its step's record cannot: that it runs, or runs again."""
    return RunStep(
        name=told["name"],
        needs=tuple(told["needs"]),
        job_id=told["job_id"],
        state=job.state if job else told["status"],
        message=told["message"] or (job.message if job else ""),
        started_at=job.started_at if job else None,
        ended_at=job.ended_at if job else None,
    )
