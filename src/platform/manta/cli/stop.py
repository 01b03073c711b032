"""`manta stop`: end a job."""

from __future__ import annotations

import shlex

import click

from manta.cli import output, watch
from manta.cluster import record


@click.command(epilog=output.example("manta stop train-1a2b3c4d"))
@click.argument("job")
@output.cluster_option
@output.dry_run_option
@output.json_option
def command(job: str, cluster: str, dry_run: bool, as_json: bool) -> None:
    """Stop JOB and wait until it has ended. A job that has ended already stays as it is."""
    if dry_run:
        click.echo(shlex.join(["ray", "job", "stop", job]))
        return
    from manta.jobs import ray_api

    client = ray_api.connect(record.find(cluster))
    with output.progress(f"stopping {job}"):
        ended = ray_api.stop(client, job)
    if as_json:
        watch.print_job(ended, as_json)
    else:
        output.say(f"{job} {ended.status.lower()}")
