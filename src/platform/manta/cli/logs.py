"""`manta logs`: what a job has written."""

from __future__ import annotations

import click

from manta.cli import output, watch
from manta.cluster import record


@click.command(epilog=output.example("manta logs train-1a2b3c4d", "manta logs -f train-1a2b3c4d"))
@click.argument("job")
@click.option("-f", "--follow", is_flag=True, help="Go on until the job ends; exit 1 if it fails.")
@output.cluster_option
@output.json_option
def command(job: str, follow: bool, cluster: str, as_json: bool) -> int:
    """Print the log of JOB; with -f, follow it. Ctrl-C stops the following, not the job."""
    from manta.jobs import ray_api

    client = ray_api.connect(record.find(cluster))
    if follow:
        ray_api.get(client, job)
        return watch.until_done(client, job, as_json=as_json)
    text = ray_api.logs(client, job)
    if as_json:
        output.print_json({"submission_id": job, "log": text})
    else:
        click.echo(text, nl=False)
    return 0
