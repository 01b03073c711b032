"""Going on with a run that failed or was stopped, also with the pipeline changed meanwhile."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import sqlalchemy as sa

from manta.errors import InputError
from manta.jobs import queries, store
from manta.jobs.model import JobState
from manta.jobs.run_request import RunRequest, StepRequest
from manta.jobs.runs import (
    RUNNING,
    SETTLED,
    WAITING,
    Run,
    RunStep,
    change,
    change_step,
    job_states,
    new_row,
    note,
    read,
)
from manta.state import State, jobs
from manta.state import pipeline_runs as runs
from manta.state import pipeline_steps as rows


def resume(state: State, run_id: str, actor: str, anew: RunRequest | None = None) -> None:
    """Let a run that failed or was stopped go on: what has not succeeded is tried again.

    Args:
        state: where it is.
        run_id: of the run.
        actor: who asks.
        anew: the pipeline as it is now. A step of it that differs from what failed gets a new
            job; None to run the same again.

    Raises InputError if there is no such run, or `anew` is of another pipeline.
    """
    with state.write() as connection:
        run = read(connection, run_id)
        if anew is not None and anew.pipeline != run.pipeline:
            raise InputError(f"run {run_id} is of pipeline {run.pipeline}, not {anew.pipeline}")
        if anew is not None and anew.cluster != run.cluster:
            raise InputError(
                f"run {run_id} is on cluster {run.cluster}", f"give --cluster {run.cluster}"
            )
        _require_none_stopping(connection, run_id)
        failed = {s.name for s in run.steps if s.settled and not s.succeeded}
        for step in run.steps:
            if step.state in SETTLED and not step.succeeded:
                _set_back(connection, run, step)
        if anew is not None:
            _replace(connection, run, anew, failed)
        for job in _to_retry(connection, run_id):
            store.retry_in(connection, job, actor)
        change(connection, runs, runs.c.id == run_id, state=RUNNING, ended_at=None)
        note(connection, actor, run, "run", f"{run_id}: resumed")


def _require_none_stopping(connection: sa.Connection, run_id: str) -> None:
    """A job that is still to end would end the step that has just been resumed."""
    under_way = jobs.c.state.in_([JobState.STARTING, JobState.RUNNING])
    query = sa.select(jobs.c.id).join(rows, rows.c.job_id == jobs.c.id)
    query = query.where(rows.c.run_id == run_id, under_way, jobs.c.stop_reason != "")
    if (job_id := connection.execute(query.limit(1)).scalar()) is not None:
        raise InputError(f"job {job_id} is still being stopped", "try again when it has ended")


def _set_back(connection: sa.Connection, run: Run, step: RunStep) -> None:
    """Let a step that failed begin anew; a job that it has begun is retried, not made again.

    A job of that id that the step has not begun is somebody else's.
    """
    has_job = bool(step.job_id and step.mark)
    fresh = {"state": RUNNING} if has_job else {"state": WAITING, "mark": ""}
    change_step(connection, run, step, message="", ended_at=None, **fresh)


def _to_retry(connection: sa.Connection, run_id: str) -> Sequence[str]:
    """Jobs of steps under way that have ended without success."""
    mine = sa.and_(rows.c.run_id == run_id, rows.c.state == RUNNING)
    over = jobs.c.state.in_([JobState.FAILED, JobState.STOPPED])
    query = sa.select(jobs.c.id).join(rows, rows.c.job_id == jobs.c.id).where(mine, over)
    return connection.execute(query).scalars().all()


def _replace(
    connection: sa.Connection, run: Run, anew: RunRequest, failed: Collection[str]
) -> None:
    """Put the steps as they are now in place of those that have not succeeded and do not run.

    Args:
        connection: of the caller's transaction.
        run: as it was.
        anew: the pipeline as it is now.
        failed: steps that had ended without success, whatever their jobs did.
    """
    here = rows.c.run_id == run.id
    found = {row.name: row for row in connection.execute(sa.select(rows).where(here))}
    states = job_states(connection, [row.job_id for row in found.values() if row.job_id])
    connection.execute(rows.delete().where(here))
    taken = {row.job_id for row in found.values()}
    for number, step in enumerate(anew.steps, 1):
        row = new_row(run.id, number, step)
        if (old := found.get(step.name)) is not None:
            kept = dict(old._mapping) | {"number": number, "needs": row["needs"]}
            is_over = states.get(old.job_id) in (JobState.FAILED, JobState.STOPPED)
            may_change = old.state == WAITING or is_over or old.name in failed
            if not may_change or step.same(StepRequest.model_validate_json(old.request)):
                row = kept
            elif step.job is not None and old.job_id:
                job_id = _free_id(connection, old, taken)
                row = new_row(run.id, number, _with_job_id(step, job_id))
            row["version"] = old.version + 1
        connection.execute(rows.insert().values(**row))
    connection.execute(
        runs.update().where(runs.c.id == run.id).values(skip_unchanged=anew.skip_unchanged)
    )


def _with_job_id(step: StepRequest, job_id: str) -> StepRequest:
    if step.job is None:
        return step
    return step.model_copy(update={"job": step.job.model_copy(update={"id": job_id})})


def _free_id(connection: sa.Connection, old: sa.Row[Any], taken: Collection[str]) -> str:
    """Id of the job that does the step in another way: `…-v2` after `…`, `…-v3` after that.

    It is the same if no job has it, of this run or another's.
    """
    job_id = str(old.job_id)
    while queries.read_job(connection, job_id) or (job_id in taken and job_id != old.job_id):
        first, _, number = job_id.rpartition("-v")
        job_id = f"{first}-v{int(number) + 1}" if first and number.isdigit() else f"{job_id}-v2"
    return job_id
