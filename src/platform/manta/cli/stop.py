"""`manta stop`: end a job."""

from __future__ import annotations

import shlex
import time

import click

from manta.cli import output, watch
from manta.errors import MantaError


@click.command(epilog=output.example("manta stop train-1a2b3c4d"))
@click.argument("job")
@click.option(
    "--timeout-s", type=click.FloatRange(1), default=60.0, show_default=True, help="To wait."
)
@output.dry_run_option
@output.json_option
def command(job: str, timeout_s: float, dry_run: bool, as_json: bool) -> None:
    """Stop JOB and wait until it has ended. A job that has ended already stays as it is.

    The wish is written down: it holds if this command is interrupted, or the cluster is away.
    """
    if dry_run:
        click.echo(shlex.join(["ray", "job", "stop", job]))
        return
    from manta.jobs import queries, request, store

    state = watch.open_state()
    watch.find(state, job)
    with output.progress(f"stopping {job}"):
        found = store.ask_stop(state, job, request.actor(), f"stopped by {request.me()}")
        deadline = time.monotonic() + timeout_s
        while not found.state.done:
            if time.monotonic() > deadline:
                raise MantaError(
                    f"job {job} is still {found.state} {timeout_s:g} s after it was to stop",
                    "the controller goes on trying; see `manta jobs show`",
                )
            watch.keep(state)
            time.sleep(0.1)
            found = queries.get(state, job)
    if as_json:
        watch.print_job(state, found, as_json)
    else:
        output.say(f"{job} {found.state.lower()}")
