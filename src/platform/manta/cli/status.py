"""`manta status`: a cluster's nodes, resources, jobs and applications."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click

from manta.cli import output

if TYPE_CHECKING:
    from manta.cluster.dashboard import Application, Node, RunningJob
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
    num_processes: int
    nodes: list[Node]
    used: dict[str, float]
    jobs: list[RunningJob]
    apps: list[Application]


@click.command(epilog=output.example("manta status", "manta status --name second --json"))
@output.cluster_option
@output.json_option
def command(cluster: str, as_json: bool) -> int:
    """Show a cluster: nodes, resources, running jobs, applications.

    Exit code 0 if it is up, 1 if it is not.
    """
    from manta.cluster import record

    if not record.path(cluster).exists():
        return _print_absent(cluster, as_json)
    status = _look(record.find(cluster))
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

    health = local.health(known)
    up = health.state == "up"
    return Status(
        cluster=known.name,
        state=health.state,
        age_s=_age_s(known.started_at),
        gcs_address=known.gcs_address,
        dashboard_url=known.dashboard_url,
        serve_url=known.serve_url,
        storage_url=known.storage_url,
        num_processes=health.num_processes,
        nodes=dashboard.nodes(known) if up else [],
        used=dashboard.used_resources(known) if up else {},
        jobs=dashboard.running_jobs(known) if up else [],
        apps=dashboard.applications(known) if up else [],
    )


def _print(status: Status) -> None:
    click.echo(f"Cluster `{status.cluster}` is {status.state}, {_duration(status.age_s)} old.")
    if status.state != "up":
        click.echo(f"  {status.num_processes} of its processes are left")
        click.echo("  start afresh with `manta down` and `manta up`")
        return
    click.echo(f"  dashboard  {status.dashboard_url}")
    click.echo(f"  endpoints  {status.serve_url}")
    click.echo(f"  storage    {status.storage_url}")
    nodes = [(node.address, node.state, _resources(node.total)) for node in status.nodes]
    _section("", ["NODE", "STATE", "RESOURCES"], nodes)
    click.echo(f"In use: {_resources(status.used) or 'not reported yet'}")
    jobs = [(job.id, job.status, _duration(job.age_s), job.entrypoint) for job in status.jobs]
    _section("No job is running.", ["JOB", "STATE", "AGE", "ENTRYPOINT"], jobs)
    apps = [(a.name, a.state, a.route_prefix or "-", _duration(a.age_s)) for a in status.apps]
    _section("No application is deployed.", ["APPLICATION", "STATE", "ROUTE", "AGE"], apps)


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
