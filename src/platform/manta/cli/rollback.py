"""`manta rollback`: go back to an earlier version of an application."""

from __future__ import annotations

from typing import Any

import click
import yaml

from manta.cli import output, watch
from manta.cli.deploy import options_of, safety_options
from manta.cluster import record


@click.command(epilog=output.example("manta rollback llm", "manta rollback llm --to 3"))
@click.argument("app", metavar="APP")
@click.option("--to", metavar="VERSION", type=click.IntRange(min=1), help="As in `apps history`.")
@safety_options
@output.cluster_option
@output.dry_run_option
@output.json_option
def command(
    app: str, to: int | None, cluster: str, dry_run: bool, as_json: bool, **safety: Any
) -> None:
    """Go back to the last healthy version of APP before the one that runs, or to VERSION.

    It is a deploy of that version's config: under the same lock, and undone if it is not healthy.
    """
    from manta.serving import rollout

    target = record.find(cluster)
    target.use()
    if dry_run:
        chosen = rollout.choose_version(target, app, to)
        click.echo("serve deploy REST.yaml   # this, and all other applications as they are:")
        click.echo(
            yaml.safe_dump(dict(chosen.config_passthrough or {}), sort_keys=False), nl=False
        )
        return
    chosen = rollout.roll_back(target, app, to, output.say, options_of(**safety))
    watch.note("rolled back", f"{app} to version {chosen.number}", cluster)
    if as_json:
        output.print_json({"app": app, "version": chosen.number})
    else:
        click.echo(f"`{app}` is as in version {chosen.number}")
