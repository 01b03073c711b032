"""`manta status`: a cluster's nodes, resources, jobs and applications."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click

from manta.cli import output
from manta.errors import MantaError

if TYPE_CHECKING:
    from manta.cluster.dashboard import Application, Node, RunningJob
    from manta.cluster.outlook import Outlook
    from manta.cluster.record import ClusterRecord

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Status:
    """What is known of one cluster at this moment."""

    cluster: str
    state: str
    age_s: float
    gcs_address: str
    dashboard_url: str
    serve_url: str
    storage_url: str
    nodes: list[Node]
    used: dict[str, float]
    jobs: list[RunningJob]
    apps: list[Application]
    num_processes: int = 0
    """Of a cluster on this machine."""
    outlook: Outlook | None = None
    """Of a cluster that Ray's launcher started, while it answers."""
    why: str = ""
    """Why it does not answer."""
    end: str = ""
    """The command that ends or forgets it, if not `manta down`."""


@click.command(epilog=output.example("manta status", "manta status --name second --json"))
@output.cluster_option
@output.json_option
def command(cluster: str, as_json: bool) -> int:
    """Show a cluster: nodes, resources, running jobs, applications.

    Of a cluster that a YAML describes also what waits and why, what the autoscaler did, and what
    the nodes that are there now cost an hour.

    Exit code 0 if it is up, 1 if it is not.
    """
    from manta.cluster import record

    if not record.path(cluster).exists():
        return _print_absent(cluster, as_json)
    status = _look(record.load(cluster))
    if as_json:
        output.print_json(asdict(status))
    else:
        _print(status)
    return 0 if status.state == "up" else 1


def _print_absent(cluster: str, as_json: bool) -> int:
    from manta.cluster import record

    if as_json:
        output.print_json({"cluster": cluster, "state": "down"})
        return 1
    click.echo(f"Cluster `{cluster}` is not up. Start it with `manta up`.")
    for other in record.load_all():
        click.echo(f"There is cluster `{other.name}`: manta status --name {other.name}")
    return 1


def _look(known: ClusterRecord) -> Status:
    from manta.cluster import dashboard, local

    if known.launched:
        return _look_launched(known)
    if known.attached:
        return _look_attached(known)
    health = local.health(known)
    up = health.state == "up"
    nodes = dashboard.nodes(known) if up else []
    used = dashboard.used_resources(known) if up else {}
    status = _status(known, health.state, nodes, used, answers=up)
    return replace(status, num_processes=health.num_processes)


def _look_attached(known: ClusterRecord) -> Status:
    from manta.cluster import dashboard

    try:
        nodes = dashboard.nodes(known)
    except MantaError as error:
        status = _status(known, "not answering", [], {}, answers=False)
        return replace(status, why=error.what, end=f"manta detach {known.name}")
    used = dashboard.used_resources(known)
    return _status(known, "up", nodes, used, answers=True)


def _look_launched(known: ClusterRecord) -> Status:
    from manta.cluster import dashboard, outlook

    reach = outlook.reach(known)
    known, answers = reach.cluster, not reach.why
    nodes = dashboard.nodes(known) if answers else []
    seen = outlook.look(known, nodes) if answers else None
    status = _status(known, reach.state, nodes, seen.used if seen else {}, answers=answers)
    return replace(status, outlook=seen, why=reach.why)


def _status(
    known: ClusterRecord, state: str, nodes: list[Node], used: dict[str, float], *, answers: bool
) -> Status:
    from manta.cluster import dashboard

    return Status(
        cluster=known.name,
        state=state,
        age_s=_age_s(known.started_at),
        gcs_address=known.gcs_address,
        dashboard_url=known.dashboard_url,
        serve_url=known.serve_url,
        storage_url=known.storage_url,
        nodes=nodes,
        used=used,
        jobs=dashboard.running_jobs(known) if answers else [],
        apps=dashboard.applications(known) if answers else [],
    )


def _print(status: Status) -> None:
    click.echo(f"Cluster `{status.cluster}` is {status.state}, {_duration(status.age_s)} old.")
    if status.why:
        click.echo(f"  {status.why}")
        click.echo(f"  end it with `{status.end or f'manta down --name {status.cluster}'}`")
        return
    if status.state != "up" and status.outlook is None:
        click.echo(f"  {status.num_processes} of its processes are left")
        click.echo("  start afresh with `manta down` and `manta up`")
        return
    click.echo(f"  dashboard  {status.dashboard_url}")
    click.echo(f"  endpoints  {status.serve_url}")
    click.echo(f"  storage    {status.storage_url}")
    nodes = [
        (node.address, node.state, node.node_type or "-", _resources(node.total))
        for node in status.nodes
    ]
    _section("", ["NODE", "STATE", "TYPE", "RESOURCES"], nodes)
    click.echo(f"In use: {_resources(status.used) or 'not reported yet'}")
    jobs = [(job.id, job.status, _duration(job.age_s), job.entrypoint) for job in status.jobs]
    _section("No job is running.", ["JOB", "STATE", "AGE", "ENTRYPOINT"], jobs)
    apps = [(a.name, a.state, a.route_prefix or "-", _duration(a.age_s)) for a in status.apps]
    _section("No application is deployed.", ["APPLICATION", "STATE", "ROUTE", "AGE"], apps)
    if status.outlook:
        _print_outlook(status.outlook)


def _print_outlook(seen: Outlook) -> None:
    click.echo()
    for waiting in seen.waiting:
        click.echo(f"Waits: {waiting.what}{': ' if waiting.why else ''}{waiting.why}")
    for node in seen.pending_nodes:
        click.echo(f"On its way: {node}")
    for failure in seen.failures:
        click.echo(f"Failed: {failure}")
    for event in seen.events:
        click.echo(f"Event: {event}")
    unpriced = ", ".join(seen.cost.unpriced)
    without = f"; without {unpriced}, whose price is not known" if unpriced else ""
    click.echo(
        f"Cost: ${seen.cost.usd_per_hour:,.2f} an hour for the nodes that are there{without}"
    )


def _section(none: str, columns: list[str], rows: Sequence[Sequence[object]]) -> None:
    click.echo()
    if rows:
        output.print_table(columns, rows)
    else:
        click.echo(none)


def _resources(resources: dict[str, float]) -> str:
    return ", ".join(
        f"{amount / GIB:.1f} GiB {name}" if name.endswith("memory") else f"{amount:g} {name}"
        for name, amount in resources.items()
    )


def _age_s(started_at: str) -> float:
    return (datetime.now(UTC) - datetime.fromisoformat(started_at)).total_seconds()


def _duration(seconds: float) -> str:
    for unit, size_s in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size_s:
            return f"{seconds / size_s:.0f} {unit}"
    return f"{seconds:.0f} s"
