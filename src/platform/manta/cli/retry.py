"""`manta retry`: put what failed back into the queue: a job, or the steps of a run."""

from __future__ import annotations

import click

from manta.cli import output, watch, watch_run


@click.command(epilog=output.example("manta retry train-1a2b3c4d"))
@click.argument("job")
@click.option("--no-wait", is_flag=True, help="Return when it is in the queue.")
@output.json_option
def command(job: str, no_wait: bool, as_json: bool) -> int:
    """Put JOB or run, which failed or was stopped, back into the queue, and follow it.

    It keeps its id, its code and its earlier attempts, and gets all its retries anew. A run goes
    on with what has not succeeded; `manta run --resume` does so with the files as they are now.
    """
    from manta.jobs import request, runs, store
    from manta.jobs.resume import resume as resume_run

    state = watch.open_state()
    if runs.find(state, job) is not None:
        known = watch_run.attempts(state, job)
        resume_run(state, job, request.actor())
        if no_wait:
            output.print_json({"run_id": job}) if as_json else click.echo(job)
            return 0
        return watch_run.until_done(state, job, as_json=as_json, after_attempts=known)
    again = store.retry(state, job, request.actor())
    if no_wait:
        watch.print_job(state, again, as_json)
        return 0
    return watch.until_done(state, job, as_json=as_json, after_attempt=again.attempt)
