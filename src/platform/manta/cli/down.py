"""`manta down`: stop a cluster and everything that it started."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from manta.cli import output, watch
from manta.errors import InputError, MantaError

if TYPE_CHECKING:
    from manta.cluster.record import ClusterRecord


@click.command(epilog=output.example("manta down", "manta down --name second --yes"))
@output.cluster_option
@click.option("--yes", "-y", is_flag=True, help="Do not ask, even if jobs are running.")
@click.option("--keep-logs", is_flag=True, help="Keep Ray's own logs on this machine; say where.")
@click.option("--forget", is_flag=True, help="Forget it even if a host cannot be asked.")
@output.dry_run_option
@output.json_option
def command(
    cluster: str, yes: bool, keep_logs: bool, forget: bool, dry_run: bool, as_json: bool
) -> None:
    """Stop a cluster and everything that it started: daemons, jobs, applications, machines.

    Other clusters are left alone, and so is all that lies in storage. Of a cluster that a YAML
    describes it is verified that nothing is left that runs or costs money; until then it is
    remembered, and `manta down` can be repeated. Stopping what is not up is no error.
    """
    from manta.cluster import record

    known = record.load(cluster) if record.path(cluster).exists() else None
    if known and known.attached:
        raise InputError(
            f"cluster `{cluster}` is not Manta's to end", f"`manta detach {cluster}` forgets it"
        )
    if dry_run:
        _print_plan(cluster, known, as_json)
        return
    if known:
        _meter(known)
    if known and known.launched:
        _end_launched(known, yes, keep_logs, forget)
        stopped: ClusterRecord | None = known
    else:
        stopped = _end_here(cluster, known, yes, keep_logs)
    if stopped is not None:
        watch.note("cluster down", cluster, cluster)
    if as_json:
        output.print_json({"cluster": cluster, "stopped": stopped is not None})
    elif stopped is None:
        click.echo(f"Cluster `{cluster}` is not up.")
    else:
        is_here = keep_logs and not stopped.launched
        logs = f" Ray's logs are in {stopped.temp_dir}." if is_here else ""
        verified = " Nothing of it is left running." if stopped.launched and not forget else ""
        click.echo(f"Cluster `{cluster}` is down.{verified}{logs}")


def _meter(known: ClusterRecord) -> None:
    """Count its nodes until now, also if no controller was looking."""
    from manta import state as states

    file = states.file_of(states.url())
    if file is not None and not file.exists():
        return  # no job was ever sent from here
    from manta.cluster import record
    from manta.jobs import metering

    try:
        metering.last_look(states.open_state(), record.find(known.name))
    except MantaError:  # it is silent, or the database is: what was seen last counts
        return


def _end_here(
    cluster: str, known: ClusterRecord | None, yes: bool, keep_logs: bool
) -> ClusterRecord | None:
    from manta.cluster import local

    if known and not yes and local.health(known).answers:
        _ask(known, [])
    with output.progress(f"Stopping cluster `{cluster}`"):
        return local.down(cluster, keep_logs=keep_logs)


def _end_launched(known: ClusterRecord, yes: bool, keep_logs: bool, forget: bool) -> None:
    from manta.cluster import kept_logs, landing, tunnel
    from manta.cluster.local import lock

    if not yes:
        lost = [] if keep_logs else ["Ray's logs are on its hosts only; --keep-logs copies them."]
        try:
            _ask(tunnel.ensure(known), lost)
        except MantaError as error:
            if isinstance(error, InputError):
                raise
            output.say(f"{error.what}; what runs there cannot be told.")
            _confirm(f"End cluster `{known.name}`?")
    if keep_logs:
        try:
            kept_logs.keep(tunnel.ensure(known), output.say)
        except MantaError as error:
            fix = "nothing was ended; without --keep-logs it is"
            raise MantaError(f"Ray's logs cannot be kept: {error.what}", fix) from None
    with lock(known.name), output.progress(f"Ending cluster `{known.name}`"):
        landing.execute(known, unverified=forget)


def _ask(known: ClusterRecord, lost: list[str]) -> None:
    """Show what would be lost; ask if that is anything."""
    from manta.cluster import dashboard

    jobs = dashboard.running_jobs(known)
    if jobs:
        output.say(f"Jobs that are running on cluster `{known.name}` will be stopped:")
    for job in jobs:
        output.say(f"  {job.id}  {job.status}  {job.entrypoint}")
    for line in lost:
        output.say(line)
    if jobs or lost:
        _confirm("Stop them?" if jobs else f"End cluster `{known.name}`?")


def _confirm(question: str) -> None:
    if not sys.stdin.isatty():
        raise InputError("nobody to ask, and something would be lost", "stop it with --yes")
    if not click.confirm(question, err=True):
        raise InputError("nothing was stopped")


def _print_plan(cluster: str, known: ClusterRecord | None, as_json: bool) -> None:
    import shlex

    from manta.cluster import processes

    if known and known.launched:
        from manta.cluster import launcher

        words = launcher.ray_words("down", known)
        hosts = [known.launched.access.head, *known.launched.hosts]
        if as_json:
            output.print_json({"cluster": cluster, "command": words, "hosts": hosts})
        else:
            click.echo(shlex.join(words))
        return
    pids = [process.pid for process in processes.members(known.cluster_id)] if known else []
    if as_json:
        output.print_json({"cluster": cluster, "pids": pids})
    else:
        click.echo("kill " + " ".join(map(str, pids)) if pids else "nothing to stop")
