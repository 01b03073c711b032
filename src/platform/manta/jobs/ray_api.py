"""Ray's job API with Manta's errors: the only file that talks to it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from manta.cluster.record import ClusterRecord
from manta.errors import InputError, MantaError
from manta.plan.jobs import JobPlan

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

TERMINAL = frozenset({"SUCCEEDED", "FAILED", "STOPPED"})
RECONNECT_DELAY_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Job:
    """What Ray knows of one submission. Times are UTC seconds; None where not reached."""

    submission_id: str
    status: str
    entrypoint: str
    message: str
    started_at: float | None
    ended_at: float | None

    @property
    def done(self) -> bool:
        """Whether the job has ended, well or not."""
        return self.status in TERMINAL

    @property
    def duration_s(self) -> float | None:
        """Seconds from start until the end, or until now."""
        return (self.ended_at or time.time()) - self.started_at if self.started_at else None


def connect(record: ClusterRecord) -> JobSubmissionClient:
    """A client of the cluster's job API. Raises MantaError if it does not answer."""
    record.use()
    from ray.job_submission import JobSubmissionClient

    _quiet_ray()
    with _explained(f"cluster `{record.name}`"):
        return JobSubmissionClient(record.dashboard_url)


def submit(client: JobSubmissionClient, plan: JobPlan) -> bool:
    """Execute the plan. Returns False if that submission id exists already: same id, same job.

    Raises:
        InputError: the id belongs to another command.
    """
    if (known := find(client, plan.submission_id)) is not None:
        if known.entrypoint != plan.entrypoint:
            raise InputError(
                f"job id {plan.submission_id} belongs to `{known.entrypoint}`", "choose another id"
            )
        return False
    with _explained(f"job {plan.submission_id}"):
        client.submit_job(
            entrypoint=plan.entrypoint,
            submission_id=plan.submission_id,
            runtime_env=dict(plan.runtime_env_passthrough),
            metadata=dict(plan.metadata),
            entrypoint_num_cpus=plan.resources.num_cpus or None,
            entrypoint_num_gpus=plan.resources.num_gpus or None,
            entrypoint_memory=plan.resources.memory_bytes or None,
            entrypoint_resources=plan.resources.custom or None,
        )
    return True


def find(client: JobSubmissionClient, submission_id: str) -> Job | None:
    """The job with that id, or None."""
    return next((job for job in list_all(client) if job.submission_id == submission_id), None)


def get(client: JobSubmissionClient, submission_id: str) -> Job:
    """The job with that id. Raises InputError if the cluster has none."""
    job = find(client, submission_id)
    if job is None:
        raise InputError(f"no job {submission_id} on this cluster", "list them with `manta jobs`")
    return job


def list_all(client: JobSubmissionClient) -> list[Job]:
    """All submissions that the cluster remembers, oldest first."""
    with _explained("job list"):
        jobs = [_job(details) for details in client.list_jobs() if details.submission_id]
    return sorted(jobs, key=lambda job: job.started_at or float("inf"))


def logs(client: JobSubmissionClient, submission_id: str) -> str:
    """Everything the job has written so far."""
    get(client, submission_id)
    with _explained(f"logs of {submission_id}"):
        return str(client.get_job_logs(submission_id))


def follow(client: JobSubmissionClient, submission_id: str, write: Callable[[str], None]) -> Job:
    """Pass the job's log to `write` as it grows; returns the job when it has ended."""
    num_written = 0
    while True:
        num_written += asyncio.run(_tail(client, submission_id, num_written, write))
        job = get(client, submission_id)
        if job.done:
            write(logs(client, submission_id)[num_written:])  # what came after the last read
            return job
        time.sleep(RECONNECT_DELAY_S)  # the stream broke while the job goes on


def stop(client: JobSubmissionClient, submission_id: str, timeout_s: float = 30) -> Job:
    """Stop the job and wait until it has ended. Idempotent: an ended job stays as it is."""
    job = get(client, submission_id)
    if job.done:
        return job
    with _explained(f"job {submission_id}"):
        client.stop_job(submission_id)
    deadline = time.monotonic() + timeout_s
    while not (job := get(client, submission_id)).done:
        if time.monotonic() > deadline:
            raise MantaError(
                f"job {submission_id} still runs {timeout_s:g} s after it was told to stop"
            )
        time.sleep(0.2)
    return job


def _quiet_ray() -> None:
    """Keep what Ray's client says of packaging and websockets off the user's terminal."""
    for handler in logging.getLogger("ray").handlers:
        handler.setLevel(logging.ERROR)


async def _tail(
    client: JobSubmissionClient, submission_id: str, skip: int, write: Callable[[str], None]
) -> int:
    """Stream the log, but for its first `skip` characters; returns how many were written."""
    seen = 0
    try:
        async for text in client.tail_job_logs(submission_id):
            fresh = text[max(0, skip - seen) :]
            seen += len(text)
            if fresh:
                write(fresh)
    except RuntimeError:
        pass  # the connection broke; `follow` looks at the job and comes back
    return max(0, seen - skip)


def _job(details: JobDetails) -> Job:
    return Job(
        submission_id=details.submission_id,
        status=str(details.status.value),
        entrypoint=details.entrypoint,
        message=details.message or "",
        started_at=details.start_time / 1000 if details.start_time else None,
        ended_at=details.end_time / 1000 if details.end_time else None,
    )


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Ray's client raises whatever its server answered, tracebacks included: one line instead."""
    import requests

    try:
        yield
    except (ConnectionError, requests.exceptions.RequestException):
        raise MantaError(
            f"{what}: the job API does not answer", "see `manta status`; start it with `manta up`"
        ) from None
    except (RuntimeError, ValueError) as error:
        raise MantaError(f"{what}: Ray refused it: {_last_line(str(error))}") from error


def _last_line(text: str) -> str:
    lines = [line for line in text.replace("\\n", "\n").splitlines() if line.strip(" \"'}.")]
    return lines[-1].strip() if lines else text
