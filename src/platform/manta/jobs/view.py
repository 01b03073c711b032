"""The unfinished part of the state, in the controller's memory; brought up to date by events."""

from __future__ import annotations

from collections.abc import Iterable

import sqlalchemy as sa

from manta.jobs import queries
from manta.jobs.books import Waiting
from manta.jobs.line import Line
from manta.jobs.model import Attempt, Job, JobRequest, JobState
from manta.state import State, events, jobs


class View:
    """All jobs that have not ended: `waiting` in line, and `active` by id."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._seq = -1
        self._attempts: dict[str, Attempt] = {}
        self._requests: dict[str, JobRequest] = {}
        self.waiting = Line()
        self.active: dict[str, Job] = {}
        self.changed = True
        """Whether the last refresh found anything new."""

    def refresh(self) -> None:
        """Take in what has been committed since the last time."""
        if self._seq < 0:
            self._load()
            return
        with self._state.read() as connection:
            query = sa.select(events.c.seq, events.c.job_id).where(events.c.seq > self._seq)
            rows = connection.execute(query).all()
            self.changed = bool(rows)
            if rows:
                self._reload(connection, {row.job_id for row in rows} - {""})
                self._seq = max(row.seq for row in rows)  # last: an error is made up for then

    def put(self, job: Job) -> None:
        """Take in one job that was just written."""
        self.waiting.remove(job.id)
        before = self.active.pop(job.id, None)
        if before is not None and before.state is not job.state:
            self._attempts.pop(job.id, None)  # it has started meanwhile
        if job.state.on_cluster:
            self.active[job.id] = job
        else:
            self._attempts.pop(job.id, None)
            self._requests.pop(job.id, None)
        if job.state is JobState.QUEUED:
            self.waiting.put(_waiting(job))

    def attempt(self, job: Job) -> Attempt:
        """The newest attempt of an active job."""
        known = self._attempts.get(job.id)
        if known is None or known.number != job.attempt:
            known = queries.last_attempt(self._state, job)
            assert known is not None, f"{job.id} is {job.state} without an attempt"
            self._attempts[job.id] = known
        return known

    def request(self, job: Job) -> JobRequest:
        """What was asked for, of an active job."""
        if job.id not in self._requests:
            self._requests[job.id] = queries.request_of(self._state, job.id)
        return self._requests[job.id]

    def _load(self) -> None:
        with self._state.read() as connection:
            newest = connection.execute(sa.select(sa.func.max(events.c.seq))).scalar() or 0
            self.active.clear()  # of a load that failed half-way
            self.waiting = Line(queries.read_waiting(connection))
            unfinished = jobs.c.state.in_([JobState.STARTING, JobState.RUNNING])
            ids = connection.execute(sa.select(jobs.c.id).where(unfinished)).scalars().all()
            self._reload(connection, ids)
            self._seq = newest

    def _reload(self, connection: sa.Connection, ids: Iterable[str]) -> None:
        wanted = list(ids)
        for start in range(0, len(wanted), queries.CHUNK):
            for job in queries.read_jobs(connection, wanted[start : start + queries.CHUNK]):
                self.put(job)


def _waiting(job: Job) -> Waiting:
    return Waiting(*(getattr(job, name) for name in Waiting._fields))
