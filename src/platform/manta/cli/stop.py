"""`manta stop`: end a job or a run."""

from __future__ import annotations

import shlex
import time
from typing import TYPE_CHECKING

import click

from manta.cli import output, watch, watch_run
from manta.errors import MantaError

if TYPE_CHECKING:
    from manta.jobs.model import Job
    from manta.state import State


@click.command(epilog=output.example("manta stop train-1a2b3c4d"))
@click.argument("job")
@click.option(
    "--timeout-s", type=click.FloatRange(1), default=60.0, show_default=True, help="To wait."
)
@output.dry_run_option
@output.json_option
def command(job: str, timeout_s: float, dry_run: bool, as_json: bool) -> None:
    """Stop JOB, or all jobs of a run, and wait until they have ended. What has ended stays so.

    The wish is written down: it holds if this command is interrupted, or the cluster is away.
    """
    if dry_run:
        click.echo(shlex.join(["ray", "job", "stop", job]))
        return
    from manta.jobs import queries, request, runs, store

    state = watch.open_state()
    who, reason = request.actor(), f"stopped by {request.me()}"
    if runs.find(state, job) is not None:
        run = runs.stop(state, job, who, reason)
        for step in run.steps:
            is_there = step.job_id and queries.find(state, step.job_id) is not None
            if step.job_id and is_there and step.state not in (runs.WAITING, "SUCCEEDED"):
                _wait(state, step.job_id, timeout_s)
        if as_json:
            watch_run.print_json(runs.get(state, job))
        else:
            output.say(f"{job} {run.state.lower()}")
        return
    watch.find(state, job)
    store.ask_stop(state, job, who, reason)
    found = _wait(state, job, timeout_s)
    if as_json:
        watch.print_job(state, found, as_json)
    else:
        output.say(f"{job} {found.state.lower()}")


def _wait(state: State, job: str, timeout_s: float) -> Job:
    """The job when it has ended. Raises MantaError if that takes longer."""
    from manta.jobs import queries

    with output.progress(f"stopping {job}"):
        deadline = time.monotonic() + timeout_s
        while not (found := queries.get(state, job)).state.done:
            if time.monotonic() > deadline:
                raise MantaError(
                    f"job {job} is still {found.state} {timeout_s:g} s after it was to stop",
                    "the controller goes on trying; see `manta jobs show`",
                )
            watch.keep(state)
            time.sleep(0.1)
        return found
