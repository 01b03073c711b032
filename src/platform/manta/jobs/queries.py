"""What the state knows of jobs: reading only, each function one short transaction."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import sqlalchemy as sa

from manta.errors import InputError
from manta.jobs.books import Waiting
from manta.jobs.model import Attempt, Cause, Event, Job, JobRequest, JobState, UnknownJob
from manta.state import State, attempts, clusters, events, jobs

CHUNK = 500
"""Ids in one query; databases limit the number of parameters."""
_JOB = [column for column in jobs.c if column.name != "request"]  # which is long and seldom asked


def find(state: State, job_id: str) -> Job | None:
    """The job, or None."""
    with state.read() as connection:
        return read_job(connection, job_id)


def get(state: State, job_id: str) -> Job:
    """The job. Raises InputError if there is none of that id."""
    job = find(state, job_id)
    if job is None:
        raise unknown(job_id)
    return job


def unknown(job_id: str) -> UnknownJob:
    """The error for an id that nobody knows."""
    return UnknownJob(f"no job {job_id}", "list them with `manta jobs`")


def known(state: State, ids: Sequence[str]) -> set[str]:
    """Those of `ids` that are jobs."""
    found: set[str] = set()
    with state.read() as connection:
        for start in range(0, len(ids), CHUNK):
            query = sa.select(jobs.c.id).where(jobs.c.id.in_(ids[start : start + CHUNK]))
            found.update(connection.execute(query).scalars())
    return found


def listed(
    state: State,
    *,
    states: Collection[JobState] = (),
    user: str | None = None,
    team: str | None = None,
    cluster: str | None = None,
    limit: int | None = None,
    after_seq: int = 0,
    before_seq: int | None = None,
) -> list[Job]:
    """Jobs in the order of their submission; with `limit` the newest so many."""
    query = sa.select(*_JOB).where(jobs.c.seq > after_seq)
    if before_seq is not None:
        query = query.where(jobs.c.seq < before_seq)
    if states:
        query = query.where(jobs.c.state.in_([str(s) for s in states]))
    for column, wanted in ((jobs.c.user, user), (jobs.c.team, team), (jobs.c.cluster, cluster)):
        if wanted is not None:
            query = query.where(column == wanted)
    with state.read() as connection:
        rows = connection.execute(query.order_by(jobs.c.seq.desc()).limit(limit)).all()
    return [_job(row) for row in reversed(rows)]


def waiting(state: State) -> list[Waiting]:
    """The whole queue, in the order of submission."""
    with state.read() as connection:
        return read_waiting(connection)


def read_waiting(connection: sa.Connection) -> list[Waiting]:
    """The same in a transaction of the caller."""
    columns = [jobs.c[name] for name in Waiting._fields]
    query = sa.select(*columns).where(jobs.c.state == JobState.QUEUED).order_by(jobs.c.seq)
    return [Waiting(*row) for row in connection.execute(query)]


def counts(state: State) -> dict[str, int]:
    """State → number of jobs in it."""
    query = sa.select(jobs.c.state, sa.func.count()).group_by(jobs.c.state)
    with state.read() as connection:
        rows = connection.execute(query.order_by(jobs.c.state)).all()
    return {str(row[0]): int(row[1]) for row in rows}


def states(names: Collection[str]) -> tuple[JobState, ...]:
    """States by name. Raises InputError for one that there is not."""
    try:
        return tuple(JobState(name.upper()) for name in names)
    except ValueError:
        known = ", ".join(state.lower() for state in JobState)
        raise InputError(f"no such state: {', '.join(names)}", f"states are {known}") from None


def read_jobs(connection: sa.Connection, ids: Collection[str]) -> list[Job]:
    """The jobs of those ids, in the order of their submission, in a transaction of the caller."""
    query = sa.select(*_JOB).where(jobs.c.id.in_(ids)).order_by(jobs.c.seq)
    return [_job(row) for row in connection.execute(query)]


def request_of(state: State, job_id: str) -> JobRequest:
    """What the user asked for. Raises InputError for an unknown job."""
    with state.read() as connection:
        found = connection.execute(sa.select(jobs.c.request).where(jobs.c.id == job_id)).scalar()
    if found is None:
        raise unknown(job_id)
    return JobRequest.model_validate_json(found)


def attempts_of(state: State, job_id: str) -> list[Attempt]:
    """The job's attempts, first to last."""
    query = sa.select(attempts).where(attempts.c.job_id == job_id).order_by(attempts.c.number)
    with state.read() as connection:
        return [_attempt(row) for row in connection.execute(query)]


def last_attempt(state: State, job: Job) -> Attempt | None:
    """The newest attempt; None before the first."""
    found = attempts_of(state, job.id)
    return found[-1] if found else None


def attempt_named(state: State, submission_id: str) -> Attempt | None:
    """The attempt with that Ray id; None if it is none of ours."""
    query = sa.select(attempts).where(attempts.c.submission_id == submission_id)
    with state.read() as connection:
        row = connection.execute(query).one_or_none()
    return _attempt(row) if row else None


def events_of(
    state: State, *, job_id: str | None = None, after_seq: int = 0, limit: int | None = None
) -> list[Event]:
    """What happened, in order: to one job, or to everything; with `limit` the newest so many."""
    query = sa.select(events).where(events.c.seq > after_seq)
    if job_id is not None:
        query = query.where(events.c.job_id == job_id)
    with state.read() as connection:
        rows = connection.execute(query.order_by(events.c.seq.desc()).limit(limit)).all()
    return [Event(**row._mapping) for row in reversed(rows)]


def clusters_seen(state: State) -> list[dict[str, Any]]:
    """The rows of all clusters that a controller has seen, by name."""
    with state.read() as connection:
        rows = connection.execute(sa.select(clusters).order_by(clusters.c.name))
        return [dict(row._mapping) for row in rows]


def read_job(connection: sa.Connection, job_id: str) -> Job | None:
    """The job, in a transaction of the caller."""
    row = connection.execute(sa.select(*_JOB).where(jobs.c.id == job_id)).one_or_none()
    return _job(row) if row else None


def read_known(connection: sa.Connection, job_id: str) -> Job:
    """A job that exists, in a transaction of the caller."""
    job = read_job(connection, job_id)
    assert job is not None
    return job


def _job(row: sa.Row[Any]) -> Job:
    fields = dict(row._mapping)
    fields["state"], fields["cause"] = JobState(fields["state"]), Cause(fields["cause"])
    return Job(**fields)


def _attempt(row: sa.Row[Any]) -> Attempt:
    fields = dict(row._mapping)
    fields["state"], fields["cause"] = JobState(fields["state"]), Cause(fields["cause"])
    return Attempt(**fields)
