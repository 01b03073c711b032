"""Jobs in the state: accepted once, changed only along `MOVES`, each change with its event.

Every function opens one short transaction. A change compares the job's version with the one that
its caller saw, so that of two who decide at the same time one loses and looks again.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from manta import state as states
from manta.errors import InputError, MantaError
from manta.jobs.lease import Lease
from manta.jobs.model import (
    DONE,
    MOVES,
    Attempt,
    Cause,
    IdTaken,
    Job,
    JobRequest,
    JobState,
    check_id,
    submission_id,
)
from manta.jobs.policy import Outcome, Verdict, resources_for
from manta.jobs.queries import read_job, read_known, request_of, unknown
from manta.state import State, attempts, clock, clusters, events, jobs, now

CONTROLLER = "controller"


class Conflict(MantaError):
    """Someone else has changed the job since it was read: look again."""


def submit(state: State, request: JobRequest, actor: str) -> tuple[Job, bool]:
    """Accept a job. Same id and same content: the same job, however often and from wherever.

    Returns:
        The job, and whether it is new.

    Raises:
        InputError: the id cannot be one, or belongs to another job.
    """
    with state.write() as connection:
        return submit_in(connection, request, actor)


def submit_in(connection: sa.Connection, request: JobRequest, actor: str) -> tuple[Job, bool]:
    """The same in a transaction of the caller."""
    check_id(request.id)
    digest = request.digest()
    at = clock(connection)  # not of whoever sends it: the deadline counts from here
    known = read_job(connection, request.id)
    if known is not None:
        if known.digest != digest:
            raise IdTaken(
                f"job id {request.id} belongs to `{known.entrypoint}`", "choose another id"
            )
        return known, False
    connection.execute(
        jobs.insert().values(
            **_new_row(request.id, origin="manta", at=at)
            | {"clusters": " ".join(request.clusters), "spill_after_s": request.spill_after_s},
            name=request.name,
            user=request.user,
            team=request.team,
            priority=request.priority,
            cluster=request.cluster,
            shape=request.shape,
            digest=digest,
            entrypoint=request.entrypoint,
            storage_url=request.storage_url,
            deadline_at=at + request.deadline_s if request.deadline_s else None,
            request=request.model_dump_json(),
        )
    )
    _note(connection, at, actor, "submitted", request.id, request.cluster, request.entrypoint)
    return read_known(connection, request.id), True


def _new_row(job_id: str, *, origin: str, at: float) -> dict[str, Any]:
    return {
        "id": job_id,
        "version": 1,
        "state": JobState.QUEUED,
        "origin": origin,
        "attempt": 0,
        "num_failures": 0,
        "submitted_at": at,
        "not_before": 0.0,
        "queued_at": at,
        "clusters": "",
        "spill_after_s": 0.0,
        "cause": "",
        "message": "",
        "stop_reason": "",
    }


def ask_stop(state: State, job_id: str, actor: str, reason: str) -> Job:
    """Ask for the job's end. One that waits ends here and now; one that has ended stays so."""
    with state.write() as connection:
        job = read_job(connection, job_id)
        if job is None:
            raise unknown(job_id)
        if job.state.done or job.stop_reason:
            return job
        if job.state is JobState.QUEUED:
            end = {"ended_at": now(), "cause": Cause.STOPPED, "message": reason}
            return _move(connection, job, JobState.STOPPED, actor, "stopped", reason, **end)
        return _change(connection, job, actor, "stop asked", reason, stop_reason=reason)


def retry(state: State, job_id: str, actor: str) -> Job:
    """Put a job that failed or was stopped back into the queue, with all its retries.

    The pipeline run that it is a step of goes on with it.

    Raises InputError if it has not ended, or has succeeded.
    """
    with state.write() as connection:
        job = retry_in(connection, job_id, actor)
        _reopen(connection, job_id)
        return job


def retry_in(connection: sa.Connection, job_id: str, actor: str) -> Job:
    """The same in a transaction of the caller; its run stays as it is."""
    job = read_job(connection, job_id)
    if job is None:
        raise unknown(job_id)
    if JobState.QUEUED not in MOVES[job.state] or not job.state.done:
        raise InputError(f"job {job_id} is {job.state}", "only one that failed can be retried")
    if job.origin != "manta":
        raise InputError(f"job {job_id} was not sent by Manta", "send it anew")
    fresh = {"not_before": 0.0, "num_failures": 0, "ended_at": None, "stop_reason": ""}
    fresh |= {"queued_at": now()}
    return _move(connection, job, JobState.QUEUED, actor, "retried", "", **fresh)


def _reopen(connection: sa.Connection, job_id: str) -> None:
    """Whoever has decided about the step on what was before finds another version of it."""
    steps, runs = states.pipeline_steps, states.pipeline_runs
    begun = sa.and_(steps.c.state.in_(["RUNNING", "FAILED", "STOPPED"]), steps.c.mark != "")
    mine = sa.and_(steps.c.job_id == job_id, begun)
    ids = connection.execute(sa.select(steps.c.run_id).where(mine)).scalars().all()
    again = {"state": "RUNNING", "message": "", "ended_at": None, "version": steps.c.version + 1}
    connection.execute(steps.update().where(mine).values(**again))
    over = sa.and_(runs.c.id.in_(ids), runs.c.state.in_(["FAILED", "STOPPED"]))
    connection.execute(runs.update().where(over).values(state="RUNNING", ended_at=None))


# -- What only the controller does: each shows its lease first. --


def begin_attempt(
    state: State, lease: Lease, job: Job, *, cluster: str, cluster_id: str
) -> tuple[Job, Attempt]:
    """Write down the next attempt, *before* Ray is asked: a successor finds what was started."""
    request, number, at = request_of(state, job.id), job.attempt + 1, now()
    with state.write() as connection:
        lease.check(connection)
        num_out_of_memory = connection.execute(
            sa.select(sa.func.count())
            .select_from(attempts)
            .where(attempts.c.job_id == job.id, attempts.c.cause == Cause.OUT_OF_MEMORY)
        ).scalar_one()
        attempt = Attempt(
            job_id=job.id,
            number=number,
            submission_id=submission_id(job.id, number),
            cluster=cluster,
            cluster_id=cluster_id,
            state=JobState.STARTING,
            resources=resources_for(request, num_out_of_memory).model_dump_json(),
            created_at=at,
            started_at=None,
            ended_at=None,
            node_id="",
            exit_code=None,
            cause=Cause.NONE,
            message="",
            log_state="growing",
        )
        text = f"attempt {number} on cluster {cluster}"
        fields = {"attempt": number, "cause": "", "message": ""}
        job = _move(connection, job, JobState.STARTING, CONTROLLER, "starting", text, **fields)
        connection.execute(attempts.insert().values(**vars(attempt)))
    return job, attempt


def mark_running(
    state: State, lease: Lease, job: Job, attempt: Attempt, *, at: float, node_id: str
) -> Job:
    """The attempt's driver runs."""
    with state.write() as connection:
        lease.check(connection)
        _update(connection, attempt, state=JobState.RUNNING, started_at=at, node_id=node_id)
        return _move(
            connection,
            job,
            JobState.RUNNING,
            CONTROLLER,
            "running",
            f"attempt {attempt.number}",
            started_at=job.started_at or at,
        )


def end_attempt(
    state: State,
    lease: Lease,
    job: Job,
    attempt: Attempt,
    outcome: Outcome,
    verdict: Verdict,
    *,
    ended_at: float,
    log_state: str,
) -> Job:
    """The attempt has ended: write down how, and what becomes of the job."""
    cause = verdict.cause if verdict.cause is not Cause.NONE else outcome.cause
    with state.write() as connection:
        lease.check(connection)
        _update(
            connection,
            attempt,
            state=outcome.state,
            ended_at=ended_at,
            exit_code=outcome.exit_code,
            cause=cause,
            message=outcome.message,
            log_state=log_state,
        )
        fields: dict[str, Any] = {"cause": verdict.cause, "message": verdict.message}
        if verdict.state is JobState.QUEUED:
            fields |= {"not_before": verdict.not_before, "stop_reason": "", "queued_at": now()}
            fields |= {"num_failures": job.num_failures + int(verdict.counts)}
        else:
            fields |= {"ended_at": ended_at}
        kind = "requeued" if verdict.state is JobState.QUEUED else verdict.state.lower()
        text = f"attempt {attempt.number}"
        if cause:
            said = _first_line(verdict.message)
            text += f": {said}" if said.startswith(cause) else f": {cause}: {said}"
        if verdict.state is JobState.QUEUED and verdict.not_before > now():
            text += f"; next try in {verdict.not_before - now():.0f} s"
        return _move(connection, job, verdict.state, CONTROLLER, kind, text, **fields)


def ask_stop_now(state: State, lease: Lease, job: Job, reason: str) -> Job:
    """The controller's own reason to end an attempt, or a job that still waits."""
    with state.write() as connection:
        lease.check(connection)
        if job.state is JobState.QUEUED:
            end = {"ended_at": now(), "cause": Cause.DEADLINE, "message": reason}
            return _move(connection, job, JobState.FAILED, CONTROLLER, "failed", reason, **end)
        return _change(connection, job, CONTROLLER, "stop asked", reason, stop_reason=reason)


def send_to(state: State, lease: Lease, job: Job, cluster: str, reason: str) -> Job:
    """Let a queued job wait for another cluster."""
    with state.write() as connection:
        lease.check(connection)
        text = f"from cluster {job.cluster} to {cluster}: {reason}"
        return _change(
            connection, job, CONTROLLER, "moved", text, cluster=cluster, queued_at=now()
        )


def adopt(
    state: State, lease: Lease, request: JobRequest, *, submitted_at: float, cluster_id: str
) -> Job | None:
    """Keep in history a job that came with plain `ray job submit`. None if it is known."""
    with state.write() as connection:
        lease.check(connection)
        if read_job(connection, request.id) is not None:
            return None
        row = _new_row(request.id, origin="ray", at=submitted_at)
        row |= {"state": JobState.STARTING, "attempt": 1}
        row |= {key: getattr(request, key) for key in ("name", "user", "team", "cluster")}
        row |= {"priority": 0, "shape": request.shape, "digest": request.digest()}
        row |= {"entrypoint": request.entrypoint, "storage_url": request.storage_url}
        connection.execute(jobs.insert().values(**row, request=request.model_dump_json()))
        attempt = {
            "job_id": request.id,
            "number": 1,
            "submission_id": request.id,
            "cluster": request.cluster,
            "cluster_id": cluster_id,
            "state": JobState.STARTING,
            "resources": request.resources.model_dump_json(),
            "created_at": submitted_at,
            "node_id": "",
            "cause": "",
            "message": "",
            "log_state": "growing",
        }
        connection.execute(attempts.insert().values(**attempt))
        _note(connection, now(), CONTROLLER, "seen", request.id, request.cluster, "sent by ray")
        return read_known(connection, request.id)


def see_cluster(
    state: State,
    lease: Lease,
    name: str,
    *,
    cluster_id: str,
    storage_url: str,
    status: str,
    resources: str,
    seen_at: float,
) -> None:
    """Remember what a cluster is; one that is gone (no `storage_url`) keeps the one it had."""
    facts = {
        "cluster_id": cluster_id,
        "state": status,
        "resources": resources,
        "seen_at": seen_at,
        **({"storage_url": storage_url} if storage_url else {}),
    }
    with state.write() as connection:
        lease.check(connection)
        known = clusters.update().where(clusters.c.name == name).values(**facts)
        if not connection.execute(known).rowcount:
            row = {"storage_url": "", **facts}
            connection.execute(clusters.insert().values(name=name, **row))


# -- The pieces --


def _move(
    connection: sa.Connection,
    job: Job,
    to: JobState,
    actor: str,
    kind: str,
    text: str,
    **fields: Any,
) -> Job:
    assert to in MOVES[job.state], f"{job.id}: {job.state} to {to}"
    return _change(connection, job, actor, kind, text, state=to, **fields)


def _change(
    connection: sa.Connection, job: Job, actor: str, kind: str, text: str, **fields: Any
) -> Job:
    same = sa.and_(jobs.c.id == job.id, jobs.c.version == job.version, jobs.c.state == job.state)
    done = connection.execute(jobs.update().where(same).values(version=job.version + 1, **fields))
    if not done.rowcount:
        raise Conflict(f"job {job.id} has changed meanwhile", "try again")
    _note(connection, now(), actor, kind, job.id, job.cluster, text)
    return read_known(connection, job.id)


def _update(connection: sa.Connection, attempt: Attempt, **fields: Any) -> None:
    same = sa.and_(
        attempts.c.job_id == attempt.job_id,
        attempts.c.number == attempt.number,
        attempts.c.state.not_in([str(s) for s in DONE]),  # an end is final
    )
    if not connection.execute(attempts.update().where(same).values(**fields)).rowcount:
        raise Conflict(f"attempt {attempt.submission_id} has ended already")


def _note(
    connection: sa.Connection,
    at: float,
    actor: str,
    kind: str,
    job_id: str,
    cluster: str,
    text: str,
) -> None:
    connection.execute(
        events.insert().values(
            at=at, actor=actor, kind=kind, job_id=job_id, cluster=cluster, text=text
        )
    )


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")[:200]
