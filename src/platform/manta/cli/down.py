"""`manta down`: stop a cluster and everything that it started."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from manta.cli import output
from manta.errors import InputError

if TYPE_CHECKING:
    from manta.cluster.record import ClusterRecord


@click.command(epilog=output.example("manta down", "manta down --name second --yes"))
@output.cluster_option
@click.option("--yes", "-y", is_flag=True, help="Do not ask, even if jobs are running.")
@click.option("--keep-logs", is_flag=True, help="Keep Ray's own logs; say where.")
@output.dry_run_option
@output.json_option
def command(cluster: str, yes: bool, keep_logs: bool, dry_run: bool, as_json: bool) -> None:
    """Stop a cluster and everything that it started: daemons, jobs, applications.

    Other clusters on this machine are left alone, and so is all that lies in storage. Stopping
    what is not up is no error.
    """
    from manta.cluster import local, record

    if dry_run:
        _print_plan(cluster, as_json)
        return
    if record.path(cluster).exists() and not yes:
        _ask(record.find(cluster))
    with output.progress(f"Stopping cluster `{cluster}`"):
        stopped = local.down(cluster, keep_logs=keep_logs)
    if as_json:
        output.print_json({"cluster": cluster, "stopped": stopped is not None})
    elif stopped is None:
        click.echo(f"Cluster `{cluster}` is not up.")
    else:
        logs = f" Ray's logs are in {stopped.temp_dir}." if keep_logs else ""
        click.echo(f"Cluster `{cluster}` is down.{logs}")


def _ask(known: ClusterRecord) -> None:
    from manta.cluster import dashboard, local

    if not local.health(known).answers:
        return  # nothing can be running that stopping would lose
    jobs = dashboard.running_jobs(known)
    if not jobs:
        return
    output.say(f"Jobs that are running on cluster `{known.name}` will be stopped:")
    for job in jobs:
        output.say(f"  {job.id}  {job.status}  {job.entrypoint}")
    if not sys.stdin.isatty():
        raise InputError("there are running jobs and nobody to ask", "stop them with --yes")
    if not click.confirm("Stop them?", err=True):
        raise InputError("nothing was stopped")


def _print_plan(cluster: str, as_json: bool) -> None:
    from manta.cluster import processes, record

    known = record.find(cluster) if record.path(cluster).exists() else None
    pids = [process.pid for process in processes.members(known.cluster_id)] if known else []
    if as_json:
        output.print_json({"cluster": cluster, "pids": pids})
    else:
        click.echo("kill " + " ".join(map(str, pids)) if pids else "nothing to stop")
