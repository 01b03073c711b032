"""`manta up`: start a Ray cluster on this machine."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from manta.cli import output
from manta.cluster.record import DEFAULT_NAME

if TYPE_CHECKING:
    from manta.cluster.local import UpPlan

GIB = 2**30


@click.command(
    epilog=output.example(
        "manta up", "manta up --name second --ports auto", 'eval "$(manta env)"; ray status'
    )
)
@output.cluster_option
@click.option(
    "--ports",
    type=click.Choice(["default", "auto"]),
    default="default",
    show_default=True,
    help="auto: free ones, so that clusters live side by side.",
)
@click.option("--gcs-port", type=click.IntRange(1024, 65535), help="Control store. [6379]")
@click.option("--dashboard-port", type=click.IntRange(1024, 65535), help="Dashboard. [8265]")
@click.option("--serve-port", type=click.IntRange(1024, 65535), help="Serve's HTTP. [8000]")
@click.option("--num-cpus", type=click.IntRange(1), help="Logical CPUs. [cores, but at least 8]")
@click.option(
    "--object-store-gib", type=click.FloatRange(0.1), help="[an eighth of memory, at most 2]"
)
@click.option(
    "--timeout-s", type=click.FloatRange(1), default=180.0, show_default=True, help="To be ready."
)
@output.dry_run_option
@output.json_option
def command(
    cluster: str,
    ports: str,
    gcs_port: int | None,
    dashboard_port: int | None,
    serve_port: int | None,
    num_cpus: int | None,
    object_store_gib: float | None,
    timeout_s: float,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Start a Ray cluster on this machine.

    It listens on loopback only and asks for a token, which is made once and kept in a file that
    only you can read. It goes on running when the terminal closes, until `manta down`.
    """
    from manta.cluster import local
    from manta.cluster.ports import choose

    asked = {"gcs": gcs_port, "dashboard": dashboard_port, "serve": serve_port}
    plan = local.plan_up(
        local.options_here(
            cluster,
            choose(asked, automatic=ports == "auto"),
            num_cpus=num_cpus,
            object_store_memory_bytes=int(object_store_gib * GIB) if object_store_gib else None,
        )
    )
    if dry_run:
        _print_plan(plan, as_json)
        return
    with output.progress(f"Starting cluster `{cluster}`") as tell:
        record = local.execute(plan, timeout_s, tell)
    if as_json:
        output.print_json(asdict(record))
        return
    click.echo(f"Cluster `{record.name}` is up.")
    click.echo(f"  dashboard  {record.dashboard_url}  (token: the content of {record.token_path})")
    click.echo(f"  endpoints  {record.serve_url}")
    click.echo(f"  storage    {record.storage_url}")
    flag = "" if record.name == DEFAULT_NAME else f" --name {record.name}"
    click.echo(f'  plain ray and serve commands: eval "$(manta env{flag})"')


def _print_plan(plan: UpPlan, as_json: bool) -> None:
    if as_json:
        output.print_json(
            {"argv": plan.argv, "environment": plan.environment, "unset": plan.unset}
        )
    else:
        click.echo(plan.command())
