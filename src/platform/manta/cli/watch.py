"""Following a job on the terminal: its log as it grows, its end, and Ctrl-C that harms nothing."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from manta.cli import output

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

    from manta.jobs.ray_api import Job


def until_done(client: JobSubmissionClient, submission_id: str, *, as_json: bool) -> int:
    """Print the job's log until it ends; returns the exit code: 0 if it succeeded, else 1.

    With `as_json` the log goes to stderr, so that stdout holds one document.
    """
    from manta.jobs import ray_api

    stream = sys.stderr if as_json else sys.stdout
    try:
        job = ray_api.follow(client, submission_id, lambda text: _write(stream, text))
    except KeyboardInterrupt:
        leave(submission_id)
        raise
    if as_json:
        print_job(job, as_json)
    else:
        _say_end(job)
    return 0 if job.status == "SUCCEEDED" else 1


def leave(submission_id: str) -> None:
    """Say that the job goes on, and how to watch or stop it."""
    output.say(
        f"\n{submission_id} goes on. Watch it: manta logs -f {submission_id}"
        f"  Stop it: manta stop {submission_id}"
    )


def print_job(job: Job, as_json: bool) -> None:
    """Print one job: its id for people, all that is known for programs."""
    if as_json:
        output.print_json({**asdict(job), "duration_s": job.duration_s})
    else:
        click.echo(job.submission_id)


def seconds(duration_s: float | None) -> str:
    """A duration for people: `42.0 s`, `3 min 20 s`; `-` if there is none."""
    if duration_s is None:
        return "-"
    minutes, rest = divmod(round(duration_s), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{duration_s:.1f} s"


def _write(stream: object, text: str) -> None:
    print(text, end="", file=stream, flush=True)  # type: ignore[call-overload]


def _say_end(job: Job) -> None:
    if job.status == "SUCCEEDED":
        output.say(f"{job.submission_id} succeeded after {seconds(job.duration_s)}")
    else:
        output.say(f"{job.submission_id} {job.status.lower()}: {job.message.strip()}")
