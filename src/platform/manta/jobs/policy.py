"""What follows from how an attempt ended: its cause, and whether it is tried again. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from manta.jobs.model import Cause, JobRequest, JobState
from manta.jobs.ray_api import RayJob
from manta.spec import Resources

MAX_BACKOFF_S = 300.0
KILLED = (-9, 137)
"""Exit codes of a driver that got SIGKILL, which on Linux is how memory runs out."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How an attempt ended."""

    state: JobState
    cause: Cause
    message: str
    exit_code: int | None = None


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What becomes of the job."""

    state: JobState
    """QUEUED for another attempt, or the job's end."""
    cause: Cause
    message: str
    not_before: float
    """UTC seconds before which no attempt starts."""
    counts: bool
    """Whether it uses up one of `max_retries`."""


# What Ray writes where, in the order in which it is looked for: a lost node also kills workers,
# and its message says so as well. Sources: ray/exceptions.py and src/ray/common/status.cc of 2.60,
# and jobs that are made to fail in tests/integration/test_queue_causes.py.
_SIGNS: tuple[tuple[Cause, re.Pattern[str]], ...] = (
    (Cause.PREEMPTED, re.compile(r"preempt|AUTOSCALER_DRAIN_(PREEMPTED|TERMINATED)", re.I)),
    (
        Cause.OUT_OF_MEMORY,
        # Not "OOM killer": Ray names it among the guesses of every actor that died unexpectedly.
        re.compile(r"OutOfMemoryError|running low on memory|^MemoryError", re.M),
    ),
    (
        Cause.NODE_LOST,
        re.compile(
            r"NodeDiedError|node has died|node (it|they) (was|were|is) running on"
            r"|ObjectLostError|OwnerDiedError|raylet.{0,40}died"
        ),
    ),
    (Cause.HEAD_GONE, re.compile(r"GCS.{0,40}(unavailable|failed|lost)|RpcError.{0,60}gcs", re.I)),
    (Cause.NO_AGENT, re.compile(r"No available agent")),
    # A worker that died by itself: a crash of the user's code, or the system's out-of-memory
    # killer, which leaves no word.
    (Cause.UNKNOWN, re.compile(r"WorkerCrashedError|ActorDiedError")),
)


def outcome_of(job: RayJob) -> Outcome:
    """How an ended submission ended, from all that Ray says of it."""
    if job.status == "SUCCEEDED":
        return Outcome(state=JobState.SUCCEEDED, cause=Cause.NONE, message="", exit_code=0)
    if job.status == "STOPPED":
        return Outcome(state=JobState.STOPPED, cause=Cause.STOPPED, message="it was stopped")
    return Outcome(
        state=JobState.FAILED,
        cause=_cause(job),
        message=job.message.strip(),
        exit_code=job.exit_code,
    )


def _cause(job: RayJob) -> Cause:
    if job.error_type == "RUNTIME_ENV_SETUP_FAILURE":
        return Cause.ENVIRONMENT
    if job.error_type == "JOB_SUPERVISOR_ACTOR_START_TIMEOUT":
        return Cause.NO_RESOURCES
    # The last lines of the driver's log are part of Ray's message, so what its own tasks and
    # actors died of is seen as well.
    signs = [cause for cause, pattern in _SIGNS if pattern.search(job.message)]
    if job.error_type == "JOB_SUPERVISOR_ACTOR_UNSCHEDULABLE":
        return signs[0] if signs else Cause.NO_RESOURCES
    if job.error_type == "JOB_ENTRYPOINT_COMMAND_ERROR" or job.exit_code is not None:
        if job.exit_code in KILLED:
            return Cause.OUT_OF_MEMORY
        return signs[0] if signs else Cause.USER_ERROR
    return signs[0] if signs else Cause.UNKNOWN


def after(
    request: JobRequest,
    outcome: Outcome,
    *,
    num_failures: int,
    stop_reason: str,
    now: float,
    ran: bool = True,
) -> Verdict:
    """Whether the job is done or tried again.

    Args:
        request: what the user asked for, retries among it.
        outcome: how the newest attempt ended.
        num_failures: attempts that failed before this one.
        stop_reason: `KIND: words` if someone asked for the attempt's end.
        now: UTC seconds.
        ran: whether the attempt was ever seen to run.
    """
    kind = stop_reason.partition(":")[0]
    if outcome.state is JobState.SUCCEEDED:
        return _end(JobState.SUCCEEDED, Cause.NONE, "")
    if kind == Cause.PREEMPTED:  # by the queue itself: it goes on when there is room again
        return Verdict(
            state=JobState.QUEUED,
            cause=Cause.PREEMPTED,
            message=stop_reason,
            not_before=now,
            counts=False,
        )
    if kind == Cause.DEADLINE:
        return _end(JobState.FAILED, Cause.DEADLINE, stop_reason)
    if stop_reason and kind != Cause.TIMEOUT:
        cause = Cause.BUDGET if kind == Cause.BUDGET else Cause.STOPPED
        return _end(JobState.STOPPED, cause, stop_reason)
    if kind == Cause.TIMEOUT:
        outcome = replace(outcome, cause=Cause.TIMEOUT, message=stop_reason)
    if outcome.cause is Cause.HEAD_GONE and not ran:  # the cluster went before it got the job
        return Verdict(
            state=JobState.QUEUED,
            cause=outcome.cause,
            message=outcome.message,
            not_before=now,
            counts=False,
        )
    if outcome.cause is Cause.STOPPED:
        return _end(JobState.STOPPED, Cause.STOPPED, "it was stopped on the cluster")
    if outcome.cause.value not in request.retry.on or num_failures >= request.retry.max_retries:
        return _end(JobState.FAILED, outcome.cause, outcome.message)
    return Verdict(
        state=JobState.QUEUED,
        cause=outcome.cause,
        message=outcome.message,
        not_before=now + backoff_s(request.retry.backoff_s, num_failures),
        counts=True,
    )


def backoff_s(first_s: float, num_failures: int) -> float:
    """Seconds before the next attempt: doubles with each failure, up to MAX_BACKOFF_S."""
    return float(min(MAX_BACKOFF_S, first_s * 2 ** min(num_failures, 30)))


def resources_for(request: JobRequest, num_out_of_memory: int) -> Resources:
    """What the next attempt's entrypoint gets: larger after it ran out of memory, if told so."""
    larger = request.retry.larger
    if not num_out_of_memory or not larger:
        return request.resources
    return larger[min(num_out_of_memory, len(larger)) - 1]


def overdue(request: JobRequest, submitted_at: float, started_at: float | None, now: float) -> str:
    """Why the job must be stopped now: its time-out or its deadline; empty if it need not."""
    if request.deadline_s is not None and now > submitted_at + request.deadline_s:
        return f"{Cause.DEADLINE}: over {request.deadline_s:g} s after submission"
    if request.timeout_s is not None and started_at and now > started_at + request.timeout_s:
        return f"{Cause.TIMEOUT}: over {request.timeout_s:g} s of running"
    return ""


def _end(state: JobState, cause: Cause, message: str) -> Verdict:
    return Verdict(state=state, cause=cause, message=message, not_before=0.0, counts=False)
