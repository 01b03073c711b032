"""`manta drain`: empty a worker and let it go, without losing a request."""

from __future__ import annotations

import shlex

import click

from manta.cli import output, watch
from manta.cluster import record


@click.command(epilog=output.example("manta drain 10.0.0.12", "manta drain 3f9c2a1b --dry-run"))
@click.argument("node", metavar="ADDRESS|ID")
@click.option(
    "--deadline-s",
    type=click.IntRange(1),
    help="Tell Ray when the machine will be gone; what runs there is not waited for longer.",
)
@click.option(
    "--timeout-s",
    type=click.FloatRange(min=0, min_open=True),
    default=600.0,
    show_default=True,
    help="Longest wait until it has left the cluster.",
)
@output.cluster_option
@output.dry_run_option
@output.json_option
def command(
    node: str,
    deadline_s: int | None,
    timeout_s: float,
    cluster: str,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Empty a worker: nothing new starts on it, Serve's replicas move to other nodes first.

    Tasks and actors that run there end in their own time; then the node leaves the cluster. The
    autoscaler may start another in its place.
    """
    from manta.cluster import dashboard, drain

    target = record.find(cluster)
    chosen = drain.choose(dashboard.nodes(target), node)
    if dry_run:
        click.echo(shlex.join(drain.command(chosen, deadline_s)))
        return
    with output.progress(f"Draining {chosen.address}") as tell:
        seconds = drain.execute(target, chosen, deadline_s, timeout_s, tell)
    watch.note("node drained", chosen.address, cluster)
    if as_json:
        output.print_json({"address": chosen.address, "id": chosen.id, "seconds": seconds})
    else:
        click.echo(f"{chosen.address} has left after {seconds:.0f} s")
