"""Pipeline runs in the state: accepted once, walked by the controller, resumed after a failure.

A run has a row, each of its steps another. A step's row tells what has been decided of it; the
job that does it has its own state, and what is shown of a step is that of the job while it runs.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from manta.errors import InputError
from manta.jobs import queries, store
from manta.jobs.lease import Lease
from manta.jobs.model import DONE, JobRequest, JobState
from manta.jobs.run_request import RunRequest, StepRequest
from manta.state import State, events, jobs, now
from manta.state import pipeline_runs as runs
from manta.state import pipeline_steps as rows

WAITING = ""
"""State of a step that has not begun."""
_RUNNING = str(JobState.RUNNING)
_SETTLED = frozenset(map(str, DONE))


@dataclass(frozen=True, kw_only=True)
class RunStep:
    """One step of a run. Times are UTC seconds; None where not known."""

    name: str
    needs: tuple[str, ...]
    job_id: str | None
    """The job that does it, or did it in an earlier run; None for a deploy."""
    state: str
    """A job's state; empty if the step has not begun."""
    settled: bool
    """Whether it has ended and what it made is known here."""
    message: str
    artifacts: Mapping[str, str]
    """What it made: name → URL."""
    mark: str
    """Hash of what it did; see jobs/unchanged.py."""
    started_at: float | None
    ended_at: float | None

    @property
    def succeeded(self) -> bool:
        """Whether later steps may build on it."""
        return self.settled and self.state == JobState.SUCCEEDED


@dataclass(frozen=True, kw_only=True)
class Run:
    """A pipeline run with its steps, each after those that it needs."""

    id: str
    seq: int
    pipeline: str
    actor: str
    cluster: str
    storage_url: str
    skip_unchanged: bool
    state: str
    """RUNNING, SUCCEEDED, FAILED or STOPPED."""
    started_at: float
    ended_at: float | None
    steps: tuple[RunStep, ...]

    @property
    def done(self) -> bool:
        """Whether nothing more begins unless it is resumed."""
        return self.state in _SETTLED


# -- What users do --


def submit(state: State, request: RunRequest, actor: str) -> bool:
    """Accept a run; whether it is new. The same id again is the same run.

    Raises InputError if the id belongs to a run of another pipeline.
    """
    at = now()
    with state.write() as connection:
        known = connection.execute(sa.select(runs.c.pipeline).where(runs.c.id == request.id))
        if (pipeline := known.scalar()) is not None:
            if pipeline != request.pipeline:
                raise InputError(
                    f"run {request.id} is of pipeline {pipeline}", "choose another id"
                )
            return False
        row = request.model_dump(exclude={"steps"})
        row |= {"actor": actor, "state": _RUNNING, "started_at": at}
        connection.execute(runs.insert().values(**row))
        for number, step in enumerate(request.steps, 1):
            connection.execute(rows.insert().values(**_new_row(request.id, number, step)))
        _note(connection, actor, request, "run began", request.id)
    return True


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
        run = _get(connection, run_id)
        if anew is not None and anew.pipeline != run.pipeline:
            raise InputError(f"run {run_id} is of pipeline {run.pipeline}, not {anew.pipeline}")
        if anew is not None and anew.cluster != run.cluster:
            raise InputError(
                f"run {run_id} is on cluster {run.cluster}", f"give --cluster {run.cluster}"
            )
        for step in run.steps:
            if not step.settled and step.state not in _SETTLED:
                continue
            if not step.succeeded:
                _set_back(connection, run_id, step)
        if anew is not None:
            _replace(connection, run, anew)
        for job in _to_retry(connection, run_id):
            store.retry_in(connection, job, actor)
        _set(connection, runs, runs.c.id == run_id, state=_RUNNING, ended_at=None)
        _note(connection, actor, run, "run", f"{run_id}: resumed")


def stop(state: State, run_id: str, actor: str, reason: str) -> Run:
    """End a run: nothing more of it begins, and its jobs are asked to stop.

    Raises InputError if there is no such run.
    """
    with state.write() as connection:
        run = _get(connection, run_id)
        if not run.done:
            _set(connection, runs, runs.c.id == run_id, state="STOPPED", ended_at=now())
            _note(connection, actor, run, "run stopped", f"{run_id}: {reason}")
    for step in run.steps:
        if step.job_id and step.state not in (WAITING, *_SETTLED):
            store.ask_stop(state, step.job_id, actor, reason)
    return get(state, run_id)


# -- What is asked --


def find(state: State, run_id: str) -> Run | None:
    """The run, or None."""
    with state.read() as connection:
        return _find(connection, run_id)


def get(state: State, run_id: str) -> Run:
    """The run. Raises InputError if there is none."""
    with state.read() as connection:
        return _get(connection, run_id)


def listed(state: State, limit: int, before_seq: int | None = None) -> list[Run]:
    """The newest runs, newest first, each step as its job is now."""
    query = sa.select(runs).order_by(runs.c.seq.desc()).limit(limit)
    if before_seq is not None:
        query = query.where(runs.c.seq < before_seq)
    with state.read() as connection:
        return _read(connection, query)


def unfinished(state: State) -> list[Run]:
    """Runs that the controller walks, oldest first."""
    query = sa.select(runs).where(runs.c.state == _RUNNING).order_by(runs.c.seq)
    with state.read() as connection:
        return _read(connection, query)


def request_of(state: State, run_id: str, step: str) -> StepRequest:
    """What a step of a run does."""
    query = sa.select(rows.c.request).where(rows.c.run_id == run_id, rows.c.name == step)
    with state.read() as connection:
        return StepRequest.model_validate_json(connection.execute(query).scalar_one())


# -- What only the controller does: each shows its lease first. --


def begin_step(
    state: State, lease: Lease, run: Run, step: str, job: JobRequest | None, mark: str
) -> None:
    """The step begins: its job, if it has one, is submitted with the same commit.

    Nothing happens if the run was stopped meanwhile. Raises InputError if the job's id is taken.
    """
    with state.write() as connection:
        lease.check(connection)
        now_state = sa.select(runs.c.state).where(runs.c.id == run.id)
        if connection.execute(now_state).scalar() != _RUNNING:
            return
        if job is not None:
            store.submit_in(connection, job, run.actor)
        _set_step(connection, run, step, state=_RUNNING, mark=mark, started_at=now())
        _note(connection, store.CONTROLLER, run, "run", f"{run.id}: step {step} began")


def settle_step(
    state: State,
    lease: Lease,
    run: Run,
    step: str,
    end: JobState,
    *,
    message: str = "",
    artifacts: Mapping[str, str] | None = None,
    mark: str = "",
    job_id: str = "",
) -> None:
    """The step has ended, in `end`; an empty `mark` or `job_id` leaves what is known."""
    with state.write() as connection:
        lease.check(connection)
        facts = {"state": str(end), "message": message}
        facts |= {"artifacts": json.dumps(dict(artifacts or {}))}
        facts |= {name: value for name, value in (("mark", mark), ("job_id", job_id)) if value}
        _set_step(connection, run, step, ended_at=now(), **facts)
        text = f"{run.id}: step {step} {end.lower()}"
        _note(connection, store.CONTROLLER, run, "run", text)


def say(state: State, lease: Lease, run: Run, step: str, message: str) -> None:
    """Note how far a deploy is."""
    with state.write() as connection:
        lease.check(connection)
        _set_step(connection, run, step, message=message)


def end(state: State, lease: Lease, run: Run, how: JobState) -> None:
    """Nothing more can begin."""
    with state.write() as connection:
        lease.check(connection)
        same = sa.and_(runs.c.id == run.id, runs.c.state == _RUNNING)
        if _set(connection, runs, same, state=how, ended_at=now()):
            text = f"{run.id}: {how.lower()}"
            _note(connection, store.CONTROLLER, run, f"run {how.lower()}", text)


# -- The pieces --


def _new_row(run_id: str, number: int, step: StepRequest) -> dict[str, Any]:
    return {
        "run_id": run_id,
        "name": step.name,
        "number": number,
        "needs": json.dumps(step.needs),
        "job_id": step.job.id if step.job else None,
        "request": step.model_dump_json(),
        "state": WAITING,
        "message": "",
        "mark": "",
        "artifacts": "{}",
    }


def _set_back(connection: sa.Connection, run_id: str, step: RunStep) -> None:
    """Let a step that failed begin anew; a job of it that exists is retried, not made again."""
    here = sa.and_(rows.c.run_id == run_id, rows.c.name == step.name)
    is_there = step.job_id and queries.read_job(connection, step.job_id) is not None
    fresh = {"state": _RUNNING if is_there else WAITING, "message": "", "ended_at": None}
    _set(connection, rows, here, **fresh)


def _to_retry(connection: sa.Connection, run_id: str) -> Sequence[str]:
    """Jobs of steps under way that have ended without success."""
    mine = sa.and_(rows.c.run_id == run_id, rows.c.state == _RUNNING)
    over = jobs.c.state.in_([JobState.FAILED, JobState.STOPPED])
    query = sa.select(jobs.c.id).join(rows, rows.c.job_id == jobs.c.id).where(mine, over)
    return connection.execute(query).scalars().all()


def _replace(connection: sa.Connection, run: Run, anew: RunRequest) -> None:
    """Put the steps as they are now in place of those that have not succeeded and do not run."""
    here = rows.c.run_id == run.id
    found = {row.name: row for row in connection.execute(sa.select(rows).where(here))}
    states = _job_states(connection, [row.job_id for row in found.values() if row.job_id])
    connection.execute(rows.delete().where(here))
    for number, step in enumerate(anew.steps, 1):
        row = _new_row(run.id, number, step)
        if (old := found.get(step.name)) is not None:
            kept = dict(old._mapping) | {"number": number, "needs": row["needs"]}
            is_over = states.get(old.job_id) in (JobState.FAILED, JobState.STOPPED)
            may_change = old.state == WAITING or is_over
            if not may_change or step.same(StepRequest.model_validate_json(old.request)):
                row = kept
            elif old.job_id:
                job_id = _next_id(old.job_id) if is_over else old.job_id
                row = _new_row(run.id, number, _with_job_id(step, job_id))
        connection.execute(rows.insert().values(**row))
    connection.execute(
        runs.update().where(runs.c.id == run.id).values(skip_unchanged=anew.skip_unchanged)
    )


def _with_job_id(step: StepRequest, job_id: str) -> StepRequest:
    if step.job is None:
        return step
    return step.model_copy(update={"job": step.job.model_copy(update={"id": job_id})})


def _next_id(job_id: str) -> str:
    """Of the job that does the step in another way: `…-v2` after `…`, `…-v3` after that."""
    first, _, number = job_id.rpartition("-v")
    return f"{first}-v{int(number) + 1}" if first and number.isdigit() else f"{job_id}-v2"


def _get(connection: sa.Connection, run_id: str) -> Run:
    run = _find(connection, run_id)
    if run is None:
        raise InputError(f"no run {run_id}", "list them with `manta runs`")
    return run


def _find(connection: sa.Connection, run_id: str) -> Run | None:
    found = _read(connection, sa.select(runs).where(runs.c.id == run_id))
    return found[0] if found else None


_JOB = [
    jobs.c[name].label(f"job_{name}") for name in ("state", "message", "started_at", "ended_at")
]


def _read(connection: sa.Connection, query: sa.Select[Any]) -> list[Run]:
    found = connection.execute(query).all()
    steps: dict[str, list[RunStep]] = {row.id: [] for row in found}
    told = [column for column in rows.c if column.name != "request"]
    for start in range(0, len(found), queries.CHUNK):
        ids = [row.id for row in found[start : start + queries.CHUNK]]
        joined = rows.outerjoin(jobs, jobs.c.id == rows.c.job_id)
        chosen = sa.select(*told, *_JOB).select_from(joined).where(rows.c.run_id.in_(ids))
        for row in connection.execute(chosen.order_by(rows.c.run_id, rows.c.number)):
            steps[row.run_id].append(_step(row))
    return [Run(**row._mapping, steps=tuple(steps[row.id])) for row in found]


def _step(row: sa.Row[Any]) -> RunStep:
    """A step under way is as its job is: it waits, runs, or runs again."""
    is_settled = row.state in _SETTLED
    shows_job = row.state == _RUNNING and row.job_state is not None
    return RunStep(
        name=row.name,
        needs=tuple(json.loads(row.needs)),
        job_id=row.job_id,
        state=row.job_state if shows_job else row.state,
        settled=is_settled,
        message=row.message or (row.job_message if shows_job else "") or "",
        artifacts=json.loads(row.artifacts),
        mark=row.mark,
        started_at=row.job_started_at or row.started_at,
        ended_at=row.job_ended_at or row.ended_at,
    )


def _job_states(connection: sa.Connection, ids: Collection[str]) -> dict[str, str]:
    query = sa.select(jobs.c.id, jobs.c.state).where(jobs.c.id.in_(ids))
    return {row.id: row.state for row in connection.execute(query)}


def _set_step(connection: sa.Connection, run: Run, step: str, **facts: Any) -> None:
    _set(connection, rows, sa.and_(rows.c.run_id == run.id, rows.c.name == step), **facts)


def _set(connection: sa.Connection, table: sa.Table, where: Any, **facts: Any) -> int:
    return connection.execute(table.update().where(where).values(**facts)).rowcount


def _note(
    connection: sa.Connection, actor: str, run: Run | RunRequest, kind: str, text: str
) -> None:
    said = {"at": now(), "actor": actor, "kind": kind, "text": text}
    connection.execute(events.insert().values(**said, job_id="", cluster=run.cluster))
