"""`manta retry`: put a job that failed back into the queue."""

from __future__ import annotations

import click

from manta.cli import output, watch


@click.command(epilog=output.example("manta retry train-1a2b3c4d"))
@click.argument("job")
@click.option("--no-wait", is_flag=True, help="Return when it is in the queue.")
@output.json_option
def command(job: str, no_wait: bool, as_json: bool) -> int:
    """Put JOB, which failed or was stopped, back into the queue, and follow it.

    It keeps its id, its code and its earlier attempts, and gets all its retries anew.
    """
    from manta.jobs import request, store

    state = watch.open_state()
    again = store.retry(state, job, request.actor())
    if no_wait:
        watch.print_job(state, again, as_json)
        return 0
    return watch.until_done(state, job, as_json=as_json, after_attempt=again.attempt)
