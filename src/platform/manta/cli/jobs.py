"""`manta jobs`: what runs and ran on a cluster."""

from __future__ import annotations

from dataclasses import asdict

import click

from manta.cli import output, watch
from manta.cluster import record


@click.command(epilog=output.example("manta jobs", "manta jobs --json"))
@output.cluster_option
@output.json_option
def command(cluster: str, as_json: bool) -> None:
    """List the jobs that the cluster remembers, oldest first; plain `ray job submit` included."""
    from manta.jobs import ray_api

    jobs = ray_api.list_all(ray_api.connect(record.find(cluster)))
    if as_json:
        output.print_json([{**asdict(job), "duration_s": job.duration_s} for job in jobs])
    elif jobs:
        output.print_table(
            ["JOB", "STATUS", "TIME", "ENTRYPOINT"],
            [
                (job.submission_id, job.status, watch.seconds(job.duration_s), job.entrypoint)
                for job in jobs
            ],
        )
    else:
        output.say("no jobs yet; submit one with `manta submit`")
