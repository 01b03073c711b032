"""Following a job on the terminal: its log as it grows, its end, and Ctrl-C that harms nothing."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from manta.cli import output
from manta.errors import MantaError

if TYPE_CHECKING:
    from manta.jobs.model import Attempt, Job
    from manta.state import State

POLL_S = 0.2
SEEN_S = 15.0


def open_state() -> State:
    """The state that `$MANTA_STATE` names, with a controller at work on it."""
    from manta import state as states

    opened = states.open_state(states.url())
    keep(opened)
    return opened


def keep(state: State) -> None:
    """See that a controller is at work; starts one if not, on this machine."""
    from manta import state as states
    from manta.jobs import daemon

    daemon.ensure(state, states.url())


def note(kind: str, text: str, cluster: str = "") -> None:
    """Note in the history what this command has done. It is done: a state that is away is told."""
    from manta.jobs import audit

    try:
        audit.note_here(kind, text, cluster=cluster)
    except MantaError as error:
        output.say(f"not noted in the history: {error}")


def find(state: State, job_id: str) -> Job:
    """The job; one of plain `ray job submit` is waited for until the controller has seen it.

    Raises InputError if neither the state nor a cluster that answers has it.
    """
    from manta.jobs import queries, unseen

    job = queries.find(state, job_id)
    if job is not None:
        return job
    unseen.find(job_id)
    deadline = time.monotonic() + SEEN_S
    while (job := queries.find(state, job_id)) is None:
        if time.monotonic() > deadline:
            raise MantaError(f"the controller has not seen job {job_id}", "see `manta queue`")
        time.sleep(POLL_S)
    return job


def until_done(state: State, job_id: str, *, as_json: bool, after_attempt: int = 0) -> int:
    """Print the job's log until it ends; returns the exit code: 0 if it succeeded, else 1.

    With `as_json` the log goes to stderr, so that stdout holds one document.
    """
    from manta.jobs.follow import follow

    stream = sys.stderr if as_json else sys.stdout
    try:
        job = follow(
            state,
            job_id,
            lambda text: print(text, end="", file=stream, flush=True),
            output.say,
            lambda: keep(state),
            after_attempt=after_attempt,
        )
    except KeyboardInterrupt:
        leave(job_id)
        raise
    if as_json:
        print_job(state, job, as_json)
    else:
        _say_end(job)
    return 0 if job.state == "SUCCEEDED" else 1


def leave(job_id: str) -> None:
    """Say that the job goes on, and how to watch or stop it."""
    output.say(
        f"\n{job_id} goes on. Watch it: manta logs -f {job_id}  Stop it: manta stop {job_id}"
    )


def as_json(job: Job, attempt: Attempt | None = None) -> dict[str, Any]:
    """A job for programs; `submission_id` and `status` are called as Ray calls them."""
    return {
        "id": job.id,
        "submission_id": attempt.submission_id if attempt else job.id,
        "status": job.state,
        "duration_s": duration_s(job),
        **asdict(job),
    }


def print_job(state: State, job: Job, json: bool) -> None:
    """Print one job: its id for people, all that is known for programs."""
    from manta.jobs import queries

    if json:
        output.print_json(as_json(job, queries.last_attempt(state, job)))
    else:
        click.echo(job.id)


def duration_s(job: Job) -> float | None:
    """Seconds from its first start until its end, or until now; None before it started."""
    if not job.started_at:
        return None
    return max(0.0, (job.ended_at or time.time()) - job.started_at)  # two machines' clocks


def seconds(duration_s: float | None) -> str:
    """A duration for people: `42.0 s`, `3 min 20 s`; `-` if there is none."""
    if duration_s is None:
        return "-"
    minutes, rest = divmod(round(duration_s), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{duration_s:.1f} s"


def _say_end(job: Job) -> None:
    if job.state == "SUCCEEDED":
        output.say(f"{job.id} succeeded after {seconds(duration_s(job))}")
    else:
        output.say(f"{job.id} {job.state.lower()}: {job.message.strip()}")
