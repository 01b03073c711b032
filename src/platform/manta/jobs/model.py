"""What a durable job is: its states, what was asked for, and how its attempts ended."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from manta.errors import InputError
from manta.spec import Resources, Retry


class UnknownJob(InputError):
    """There is no job of that id."""


class IdTaken(InputError):
    """The id belongs to another job."""


PRIORITIES = {"low": -10, "normal": 0, "high": 10}
"""Bands of the queue. All of one band goes before any of the next, but for back-fill."""


class JobState(StrEnum):
    """Where a job is. Names are Ray's where Ray has one."""

    QUEUED = "QUEUED"
    """Accepted; waits for its turn, or for its next attempt."""
    STARTING = "STARTING"
    """An attempt is written down and is being handed to Ray, or waits in Ray (Ray: PENDING)."""
    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    STOPPED = "STOPPED"

    @property
    def done(self) -> bool:
        """Whether the job has ended. Only a user's `manta retry` starts it again."""
        return self in DONE

    @property
    def on_cluster(self) -> bool:
        """Whether an attempt may be known to Ray."""
        return self in (JobState.STARTING, JobState.RUNNING)


DONE = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.STOPPED})

MOVES: Mapping[JobState, frozenset[JobState]] = {
    JobState.QUEUED: frozenset({JobState.STARTING, *DONE}),
    JobState.STARTING: frozenset({JobState.RUNNING, JobState.QUEUED, *DONE}),
    JobState.RUNNING: frozenset({JobState.QUEUED, *DONE}),
    JobState.SUCCEEDED: frozenset(),
    JobState.FAILED: frozenset({JobState.QUEUED}),
    JobState.STOPPED: frozenset({JobState.QUEUED}),
}
"""Every change of state that there is; the store refuses all others."""


class Cause(StrEnum):
    """Why an attempt ended."""

    NONE = ""
    """It has not ended, or it succeeded."""
    USER_ERROR = "user_error"
    OUT_OF_MEMORY = "out_of_memory"
    NODE_LOST = "node_lost"
    PREEMPTED = "preempted"
    HEAD_GONE = "head_gone"
    NO_AGENT = "no_agent"
    NO_RESOURCES = "no_resources"
    ENVIRONMENT = "environment"
    TIMEOUT = "timeout"
    DEADLINE = "deadline"
    STOPPED = "stopped"
    BUDGET = "budget"
    """The job's own, or its team's."""
    REFUSED = "refused"
    """Ray, or whoever holds the id on the cluster, does not take it; trying again cannot help."""
    UNKNOWN = "unknown"


class JobRequest(BaseModel):
    """What a user asked for, complete: with it and the storage any cluster can run the job."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    name: str
    entrypoint: str
    runtime_env_passthrough: dict[str, Any]
    """Ray's runtime_env; local folders are replaced by the URIs of their packages."""
    packages: tuple[str, ...] = ()
    """File names under `storage_url`/code that those URIs stand for."""
    resources: Resources = Resources()
    metadata: dict[str, str] = Field(default_factory=dict)
    retry: Retry = Retry()
    timeout_s: float | None = None
    deadline_s: float | None = None
    budget_usd: float | None = None
    priority: int = 0
    user: str
    team: str = "default"
    cluster: str
    clusters: tuple[str, ...] = ()
    """Others where it may run too, in order of preference."""
    spill_after_s: float = 300.0
    shape: str = "[]"
    """What the scheduler counts, as JSON; see jobs/shape.py."""
    storage_url: str
    """Root under which the job's code and logs lie."""
    code_version: str = ""
    """Git commit of the working directory, with `+` if it was changed; empty if it has none."""
    manta_version: str = ""

    def digest(self) -> str:
        """Hash of what will run: the same id with another digest is another job."""
        return hashlib.sha256(json.dumps(self.content(), sort_keys=True).encode()).hexdigest()

    def content(self) -> dict[str, Any]:
        """What will run, as a JSON object; who asked for it, and how urgently, left out."""
        aside = {"user", "priority", "budget_usd", "code_version", "manta_version"}
        return self.model_dump(exclude=aside)


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A row of the queue. Times are UTC seconds; None where not reached."""

    id: str
    seq: int
    version: int
    state: JobState
    origin: str
    """`manta`, or `ray` for what was sent with plain `ray job submit` and is only watched."""
    name: str
    user: str
    team: str
    priority: int
    cluster: str
    clusters: str
    """All where it may run, best first, separated by spaces; empty if only `cluster`."""
    spill_after_s: float
    queued_at: float
    """When it came to wait for its cluster."""
    shape: str
    digest: str
    entrypoint: str
    storage_url: str
    attempt: int
    """Number of the newest attempt; 0 before the first."""
    num_failures: int
    """Attempts that failed and count against `max_retries`."""
    submitted_at: float
    not_before: float
    deadline_at: float | None
    started_at: float | None
    ended_at: float | None
    cause: Cause
    message: str
    stop_reason: str
    """Why the job is to stop; empty as long as nobody asked."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One try of a job on a cluster."""

    job_id: str
    number: int
    submission_id: str
    cluster: str
    cluster_id: str
    state: JobState
    resources: str
    """JSON of what its entrypoint was given."""
    created_at: float
    started_at: float | None
    ended_at: float | None
    node_id: str
    exit_code: int | None
    cause: Cause
    message: str
    log_state: str
    """`growing`, `complete`, or `cut` if the cluster went away before its end was read."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """One thing that happened; written once and never changed."""

    seq: int
    at: float
    actor: str
    kind: str
    job_id: str
    cluster: str
    text: str


_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_DERIVED = re.compile(r".*-attempt-\d+")


def check_id(job_id: str) -> str:
    """`job_id`, if it can be one. Raises InputError if not.

    It becomes part of a URL and of file names, and later attempts get names derived from it.
    """
    if not _ID.fullmatch(job_id):
        raise InputError(
            f"`{job_id[:150]}` cannot be a job's id", "use up to 128 letters, digits, `-_.`"
        )
    if _DERIVED.fullmatch(job_id):
        raise InputError(f"`{job_id}` cannot be a job's id", "later attempts are called so")
    return job_id


def submission_id(job_id: str, attempt: int) -> str:
    """Ray's id of an attempt. The first has the job's own, so that `ray job logs ID` works."""
    return job_id if attempt == 1 else f"{job_id}-attempt-{attempt}"
