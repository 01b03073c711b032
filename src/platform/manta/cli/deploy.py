"""`manta deploy`: apply a Serve config, and wait until it answers."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from manta.cli import output
from manta.cluster import record
from manta.errors import InputError

if TYPE_CHECKING:
    from manta.serving.plan import DeployPlan


@click.command(epilog=output.example("manta deploy serve_apps/llm.yaml"))
@click.argument("file", metavar="SERVE.yaml")
@click.option(
    "--timeout-s", default=900.0, show_default=True, help="Longest wait for it to be healthy."
)
@output.cluster_option
@output.dry_run_option
@output.json_option
def command(file: str, timeout_s: float, cluster: str, dry_run: bool, as_json: bool) -> None:
    """Deploy the applications of SERVE.yaml, a native Ray Serve config, and wait for them.

    Applications that the file does not name stay as they are.
    """
    plan = _plan(file, cluster, dry_run)
    if not dry_run:
        _execute(plan, cluster, timeout_s)
    if as_json:
        facts = asdict(plan)
        del facts["body_passthrough"]  # may hold secrets of other applications
        output.print_json(facts)
    elif dry_run:
        _print(plan)


def _plan(file: str, cluster: str, dry_run: bool) -> DeployPlan:
    from manta.serving import config, deploy
    from manta.serving.plan import ServeState, plan_deploy

    try:
        target = record.find(cluster)
    except InputError:
        if not dry_run:
            raise
        wanted = config.read(file)
        output.say(f"no cluster `{cluster}` is up: as if nothing ran")
        return plan_deploy(
            ServeState(),
            wanted,
            serve_host=wanted.http_host or "127.0.0.1",
            serve_port=wanted.http_port or 8000,
        )
    target.use()
    return deploy.plan(target, file)


def _execute(plan: DeployPlan, cluster: str, timeout_s: float) -> None:
    from manta.serving import deploy

    for note in plan.notes:
        output.say(note)
    try:
        deploy.execute(record.find(cluster), plan, output.say, timeout_s)
    except KeyboardInterrupt:
        output.say("\nThe deploy goes on. Watch it: manta apps")
        raise


def _print(plan: DeployPlan) -> None:
    click.echo(plan.serve_command())
    for note in plan.notes:
        click.echo(f"# {note}")
    for what in ("added", "changed", "unchanged", "kept"):
        if names := getattr(plan, what):
            click.echo(f"{what:9} {', '.join(names)}")
    click.echo(f"{'url':9} {plan.url}")
