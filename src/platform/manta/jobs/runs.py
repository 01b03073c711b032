"""Pipeline runs in the state: accepted once, walked by the controller, resumed after a failure.

A run has a row, each of its steps another. A step's row tells what has been decided of it; the
job that does it has its own state, and what is shown of a step is that of the job while it runs.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
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
RUNNING = str(JobState.RUNNING)
SETTLED = frozenset(map(str, DONE))


@dataclass(frozen=True, kw_only=True)
class RunStep:
    """One step of a run. Times are UTC seconds; None where not known."""

    name: str
    version: int
    """Changes with each decision about it, but not with what its job does."""
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
        return self.state in SETTLED

    @property
    def alive(self) -> bool:
        """Whether a step is under way, or may begin one day."""
        stuck: set[str] = set()
        for step in self.steps:  # each comes after what it needs
            if step.settled:
                stuck |= set() if step.succeeded else {step.name}
            elif step.state != WAITING or not stuck.intersection(step.needs):
                return True
            else:
                stuck.add(step.name)
        return False


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
        row |= {"actor": actor, "state": RUNNING, "started_at": at}
        connection.execute(runs.insert().values(**row))
        for number, step in enumerate(request.steps, 1):
            connection.execute(rows.insert().values(**new_row(request.id, number, step)))
        note(connection, actor, request, "run began", request.id)
    return True


def stop(state: State, run_id: str, actor: str, reason: str) -> Run:
    """End a run: nothing more of it begins, and its jobs are asked to stop.

    Raises InputError if there is no such run.
    """
    with state.write() as connection:
        run = read(connection, run_id)
        if not run.done:
            change(connection, runs, runs.c.id == run_id, state="STOPPED", ended_at=now())
            for step in run.steps:
                if step.job_id is None and step.state == RUNNING:  # a deploy goes on by itself
                    change_step(connection, run, step, state="STOPPED", ended_at=now())
            note(connection, actor, run, "run stopped", f"{run_id}: {reason}")
    for step in run.steps:
        if step.job_id and step.state not in (WAITING, *SETTLED):
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
        return read(connection, run_id)


def listed(state: State, limit: int, before_seq: int | None = None) -> list[Run]:
    """The newest runs, newest first, each step as its job is now."""
    query = sa.select(runs).order_by(runs.c.seq.desc()).limit(limit)
    if before_seq is not None:
        query = query.where(runs.c.seq < before_seq)
    with state.read() as connection:
        return _read(connection, query)


def unfinished(state: State) -> list[Run]:
    """Runs that the controller walks, oldest first."""
    query = sa.select(runs).where(runs.c.state == RUNNING).order_by(runs.c.seq)
    with state.read() as connection:
        return _read(connection, query)


def request_of(state: State, run_id: str, step: str) -> StepRequest:
    """What a step of a run does."""
    query = sa.select(rows.c.request).where(rows.c.run_id == run_id, rows.c.name == step)
    with state.read() as connection:
        return StepRequest.model_validate_json(connection.execute(query).scalar_one())


# -- What only the controller does: each shows its lease first. --


def begin_step(
    state: State, lease: Lease, run: Run, step: RunStep, job: JobRequest | None, mark: str
) -> None:
    """The step begins: its job, if it has one, is submitted with the same commit.

    Nothing happens if the run was stopped, or the step replaced, since `step` was read. Raises
    InputError if the job's id is taken.
    """
    with state.write() as connection:
        lease.check(connection)
        now_state = sa.select(runs.c.state).where(runs.c.id == run.id)
        if connection.execute(now_state).scalar() != RUNNING:
            return
        facts = {"state": RUNNING, "mark": mark, "started_at": now()}
        if not change_step(connection, run, step, **facts):
            return
        if job is not None:
            store.submit_in(connection, job, run.actor)
        note(connection, store.CONTROLLER, run, "run", f"{run.id}: step {step.name} began")


def settle_step(
    state: State,
    lease: Lease,
    run: Run,
    step: RunStep,
    end: JobState,
    *,
    message: str = "",
    artifacts: Mapping[str, str] | None = None,
    mark: str = "",
    job_id: str = "",
) -> None:
    """The step has ended, in `end`; an empty `mark` or `job_id` leaves what is known.

    Nothing happens if something else was decided about it since `step` was read.
    """
    with state.write() as connection:
        lease.check(connection)
        facts = {"state": str(end), "message": message}
        facts |= {"artifacts": json.dumps(dict(artifacts or {}))}
        facts |= {name: value for name, value in (("mark", mark), ("job_id", job_id)) if value}
        if change_step(connection, run, step, ended_at=now(), **facts):
            text = f"{run.id}: step {step.name} {end.lower()}"
            note(connection, store.CONTROLLER, run, "run", text)


def say(state: State, lease: Lease, run: Run, step: str, message: str) -> None:
    """Note how far a deploy is."""
    with state.write() as connection:
        lease.check(connection)
        here = sa.and_(rows.c.run_id == run.id, rows.c.name == step, rows.c.state == RUNNING)
        change(connection, rows, here, message=message)


def end(state: State, lease: Lease, run_id: str) -> None:
    """The run has ended, if nothing of it can go on."""
    with state.write() as connection:
        lease.check(connection)
        run = _find(connection, run_id)
        if run is None or run.done or run.alive:
            return
        states = {step.state for step in run.steps}
        how = next((s for s in (JobState.FAILED, JobState.STOPPED) if s in states), None)
        how = how or JobState.SUCCEEDED
        change(connection, runs, runs.c.id == run_id, state=str(how), ended_at=now())
        text = f"{run_id}: {how.lower()}"
        note(connection, store.CONTROLLER, run, f"run {how.lower()}", text)


# -- The pieces --


def new_row(run_id: str, number: int, step: StepRequest) -> dict[str, Any]:
    """The row of a step that has not begun."""
    return {
        "run_id": run_id,
        "name": step.name,
        "number": number,
        "version": 1,
        "needs": json.dumps(step.needs),
        "job_id": step.job.id if step.job else None,
        "request": step.model_dump_json(),
        "state": WAITING,
        "message": "",
        "mark": "",
        "artifacts": "{}",
    }


def read(connection: sa.Connection, run_id: str) -> Run:
    """The run, in a transaction of the caller. Raises InputError if there is none."""
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
    is_settled = row.state in SETTLED
    shows_job = row.state == RUNNING and row.job_state is not None
    return RunStep(
        name=row.name,
        version=row.version,
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


def job_states(connection: sa.Connection, ids: Collection[str]) -> dict[str, str]:
    """Job → its state, of those that there are."""
    query = sa.select(jobs.c.id, jobs.c.state).where(jobs.c.id.in_(ids))
    return {row.id: row.state for row in connection.execute(query)}


def change_step(connection: sa.Connection, run: Run, step: RunStep, **facts: Any) -> int:
    """Change the step's row, if it is as `step` was read; how many rows that were."""
    here = sa.and_(rows.c.run_id == run.id, rows.c.name == step.name)
    same = sa.and_(here, rows.c.version == step.version)
    return change(connection, rows, same, version=step.version + 1, **facts)


def change(connection: sa.Connection, table: sa.Table, where: Any, **facts: Any) -> int:
    """Change rows; how many they were."""
    return connection.execute(table.update().where(where).values(**facts)).rowcount


def note(
    connection: sa.Connection, actor: str, run: Run | RunRequest, kind: str, text: str
) -> None:
    """Write an event, in a transaction of the caller."""
    said = {"at": now(), "actor": actor, "kind": kind, "text": text}
    connection.execute(events.insert().values(**said, job_id="", cluster=run.cluster))
