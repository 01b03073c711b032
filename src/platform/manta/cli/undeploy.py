"""`manta undeploy`: remove one application."""

from __future__ import annotations

import click

from manta.cli import output, watch
from manta.cluster import record


@click.command(epilog=output.example("manta undeploy llm"))
@click.argument("app", metavar="APP")
@output.cluster_option
@output.dry_run_option
@output.json_option
def command(app: str, cluster: str, dry_run: bool, as_json: bool) -> None:
    """Remove application APP; the others go on."""
    from manta.serving import rollout
    from manta.serving.apps import deploy
    from manta.serving.apps.plan import plan_undeploy

    target = record.find(cluster)
    current = deploy.state(target)
    plan_undeploy(current, app)
    kept = [other.name for other in current.apps if other.name != app]
    if dry_run:
        rest = f"a Serve config of only: {', '.join(kept)}" if kept else "an empty Serve config"
        click.echo(f"serve deploy REST.yaml   # {rest}")
        return
    with output.progress(f"Removing {app}"):
        rollout.undeploy(target, app, output.say)
    watch.note("undeployed", app, cluster)
    if as_json:
        output.print_json({"removed": app, "kept": kept})
    else:
        click.echo(f"removed {app}")
