"""`manta up`: start a Ray cluster, on this machine or where a cluster YAML says."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from manta.cli import output, watch
from manta.cluster.record import DEFAULT_NAME
from manta.errors import InputError

if TYPE_CHECKING:
    from manta.cluster.local import UpPlan

GIB = 2**30
LOCAL_TIMEOUT_S = 180.0
LOCAL_ONLY = (
    "ports",
    "gcs_port",
    "dashboard_port",
    "serve_port",
    "num_cpus",
    "object_store_gib",
    "serve_tls",
    "serve_tls_address",
    "restore",
)
FILE_ONLY = ("yes", "tls", "prices", "keep")


@click.command(
    epilog=output.example(
        "manta up",
        "manta up --name second --ports auto",
        "manta up cluster/onprem.yaml --dry-run",
        "manta up cluster/aws.yaml --name team --yes",
    )
)
@click.argument("file", required=False, type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--name",
    "--cluster",
    "cluster",
    metavar="NAME",
    help=f"Which cluster.  [{DEFAULT_NAME}, or the file's cluster_name]",
)
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
    "--serve-tls",
    nargs=2,
    metavar="CERT KEY",
    type=click.Path(path_type=Path),
    help="Serve HTTPS to other machines, with these PEM files.",
)
@click.option(
    "--serve-tls-address", metavar="HOST:PORT", default="0.0.0.0:8443", show_default=True
)
@click.option(
    "--restore/--no-restore",
    default=True,
    show_default=True,
    help="Deploy again what ran when the cluster died.",
)
@click.option("--yes", "-y", is_flag=True, help="FILE: do not ask.")
@click.option("--tls", is_flag=True, help="FILE: encrypt between the hosts; again: new keys.")
@click.option(
    "--prices",
    multiple=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="FILE: your prices, laid over the built-in ones.",
)
@click.option("--keep", is_flag=True, help="FILE: leave a failed start as it is, to look at it.")
@click.option(
    "--timeout-s",
    type=click.FloatRange(1),
    help="To be ready, workers included.  [180; with FILE 1800]",
)
@output.dry_run_option
@output.json_option
@click.pass_context
def command(
    context: click.Context,
    file: Path | None,
    cluster: str | None,
    ports: str,
    gcs_port: int | None,
    dashboard_port: int | None,
    serve_port: int | None,
    num_cpus: int | None,
    object_store_gib: float | None,
    serve_tls: tuple[Path, Path] | None,
    serve_tls_address: str,
    restore: bool,
    yes: bool,
    tls: bool,
    prices: tuple[Path, ...],
    keep: bool,
    timeout_s: float | None,
    dry_run: bool,
    as_json: bool,
) -> int:
    """Start a Ray cluster on this machine, or the one that the Ray cluster YAML FILE describes.

    Either way it asks for a token, which is made once and kept in a file that only you can read,
    its dashboard and job API listen on loopback only, and it goes on running when the terminal
    closes, until `manta down`. With FILE: checks it, shows nodes and price, asks, lets Ray's own
    launcher do the work, and waits until the minimum workers have joined.

    Without FILE, if the cluster died (a crash, a reboot; not `manta down`): what ran on it is
    deployed again. Exit code 1 if the cluster is up and some of that is not.
    """
    _refuse(context, FILE_ONLY if file is None else LOCAL_ONLY, file)
    if file is not None:
        from manta.cli import up_file

        options = up_file.Options(
            name=cluster,
            yes=yes,
            tls=tls,
            prices=prices,
            keep=keep,
            timeout_s=timeout_s or up_file.TIMEOUT_S,
            dry_run=dry_run,
            as_json=as_json,
        )
        up_file.run(file, options)
        return 0
    given = context.get_parameter_source("serve_tls_address")
    if serve_tls is None and given is click.core.ParameterSource.COMMANDLINE:
        raise InputError(
            "--serve-tls-address says where, not with what", "add --serve-tls CERT KEY"
        )
    from manta.cluster import haproxy, local
    from manta.cluster.ports import choose

    asked = {"gcs": gcs_port, "dashboard": dashboard_port, "serve": serve_port}
    plan = local.plan_up(
        local.options_here(
            cluster or DEFAULT_NAME,
            choose(asked, automatic=ports == "auto"),
            num_cpus=num_cpus,
            object_store_memory_bytes=int(object_store_gib * GIB) if object_store_gib else None,
            https=haproxy.https(serve_tls_address, *serve_tls) if serve_tls else None,
        )
    )
    if dry_run:
        _print_plan(plan, as_json)
    else:
        died = _died(plan.record.name) if restore else None
        _start_here(plan, timeout_s or LOCAL_TIMEOUT_S, as_json)
        if died:
            from manta.cli import apps

            return apps.restore(plan.record.name, died)
    return 0


def _refuse(context: click.Context, names: tuple[str, ...], file: Path | None) -> None:
    """An option without effect is a mistake of the user's."""
    for name in names:
        given = context.get_parameter_source(name)
        if given is click.core.ParameterSource.COMMANDLINE:
            option = f"--{name.replace('_', '-')}"
            if file is None:
                raise InputError(f"{option} is for a cluster YAML", "name one: manta up FILE")
            raise InputError(f"{option} is for a cluster on this machine", "leave it out")


def _died(name: str) -> str | None:
    """Id of the cluster that is still on record under this name, though it is to be started."""
    from manta.cluster import record

    return record.load(name).cluster_id if record.path(name).exists() else None


def _start_here(plan: UpPlan, timeout_s: float, as_json: bool) -> None:
    from manta.cluster import local

    with output.progress(f"Starting cluster `{plan.record.name}`") as tell:
        record = local.execute(plan, timeout_s, tell)
    watch.note("cluster up", f"{record.name}: on this machine", record.name)
    if as_json:
        output.print_json(asdict(record))
        return
    output.print_cluster(record)
    if plan.https:
        click.echo(f"  TLS        https://{plan.https.host}:{plan.https.port}")


def _print_plan(plan: UpPlan, as_json: bool) -> None:
    if as_json:
        output.print_json(
            {"argv": plan.argv, "environment": plan.environment, "unset": plan.unset}
        )
    else:
        click.echo(plan.command())
