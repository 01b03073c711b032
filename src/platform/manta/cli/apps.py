"""`manta apps`: what Serve runs on a cluster, and what it ran."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click

from manta import storage
from manta.cli import output, watch, watch_apps
from manta.cluster import record
from manta.errors import InputError

if TYPE_CHECKING:
    from manta.serving.apps.history import Outcome, Version
    from manta.serving.apps.plan import App


@click.group(
    invoke_without_command=True,
    epilog=output.example(
        "manta apps", "manta apps --json", "manta apps --watch", "manta apps history llm"
    ),
)
@output.cluster_option
@output.json_option
@click.option("--watch", is_flag=True, help="Requests, speed and errors, as they change.")
@click.pass_context
def command(context: click.Context, cluster: str, as_json: bool, watch: bool) -> None:
    """List the applications that Serve knows, with their replicas, and where they answer."""
    if context.invoked_subcommand is not None:
        return
    from manta.serving.apps import deploy

    target = record.find(cluster)
    if watch:
        watch_apps.once(target) if as_json else watch_apps.follow(target)
        return
    apps = deploy.state(target).apps
    if as_json:
        output.print_json([_facts(app, target.serve_url) for app in apps])
    elif apps:
        output.print_table(
            ["APP", "STATUS", "URL", "DEPLOYMENT", "REPLICAS"],
            [row for app in apps for row in _rows(app, target.serve_url)],
        )
        for app in apps:
            if app.message:
                output.say(f"{app.name}: {app.message.strip()}")
    else:
        output.say("no applications; deploy one with `manta deploy serve_apps/llm.yaml`")


@command.command("history", epilog=output.example("manta apps history", "manta apps history llm"))
@click.argument("app", required=False)
@click.option("--limit", type=click.IntRange(1), default=20, show_default=True, help="Newest N.")
@output.cluster_option
@output.json_option
def history_(app: str | None, limit: int, cluster: str, as_json: bool) -> None:
    """List every deploy, rollback and undeploy of APP, or of all applications; newest last."""
    from manta.serving.apps import history

    home = _home(cluster)
    names = (app,) if app else history.apps(home)
    found = [version for name in names for version in history.read(home, name)]
    newest = sorted(found, key=lambda version: version.at)[-limit:]
    if as_json:
        output.print_json([asdict(version) for version in newest])
    elif newest:
        columns = ["APP", "VERSION", "WHEN (UTC)", "WHO", "WHAT", "OVER", "OUTCOME"]
        output.print_table(columns, [_version_row(version) for version in newest])
    else:
        output.say(f"no history of `{app}`" if app else "no history yet")


@command.command("restore", epilog=output.example("manta apps restore"))
@output.cluster_option
def restore_(cluster: str) -> int:
    """Deploy again what ran on the last cluster of this name, and does not run on this one.

    Exit code 1 if one of them does not run afterwards.
    """
    return restore(cluster, None)


def restore(cluster: str, died: str | None) -> int:
    """Deploy again what ran on the cluster with id `died`, or on the last one; the exit code."""
    target = record.find(cluster)
    target.use()
    from manta.serving import restore

    versions = restore.lost(target, died)
    if not versions and died is None:
        output.say("nothing to restore; see `manta apps history`")
    failed = restore.deploy_again(target, versions, output.say)
    if restored := [version.app for version in versions if version.app not in failed]:
        watch.note("restored", ", ".join(restored), cluster)
    return 1 if failed else 0


def _home(cluster: str) -> str:
    from manta.serving.apps import places

    try:
        return places.home(record.load(cluster))
    except InputError:  # it is gone; what it ran is still known
        return places.home_of_gone(cluster, storage.root())


def _version_row(version: Version) -> tuple[object, ...]:
    what = {"rollback": f"rollback to {version.of}", "deploy": f"deploy {version.file}"}
    return (
        version.app,
        version.number,
        f"{datetime.fromtimestamp(version.at, UTC):%Y-%m-%d %H:%M:%S}",
        version.by,
        what.get(version.action, version.action),
        version.replaced or "-",
        _outcome(version.outcome),
    )


def _outcome(outcome: Outcome | None) -> str:
    if outcome is None:
        return "under way, or whoever did it was killed"
    why = f": {outcome.why}" if outcome.why else f" after {outcome.after_s:g} s"
    return f"{outcome.state}{why}" + (f"; {outcome.then}" if outcome.then else "")


def _facts(app: App, serve_url: str) -> dict[str, object]:
    return {
        "name": app.name,
        "status": app.status,
        "url": _url(app, serve_url),
        "message": app.message,
        "deployments": [
            {
                "name": one.name,
                "status": one.status,
                "num_replicas": one.num_replicas,
                "target_num_replicas": one.target_num_replicas,
            }
            for one in app.deployments
        ],
    }


def _rows(app: App, serve_url: str) -> list[tuple[object, ...]]:
    first = (app.name, app.status, _url(app, serve_url) or "-")
    rows = [
        (one.name, f"{one.num_replicas} of {one.target_num_replicas}") for one in app.deployments
    ] or [("-", "-")]
    return [(*(first if number == 0 else ("", "", "")), *row) for number, row in enumerate(rows)]


def _url(app: App, serve_url: str) -> str | None:
    """Where the application answers; None if it has no route."""
    return None if app.route_prefix is None else serve_url + app.route_prefix.rstrip("/")
