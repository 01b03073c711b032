"""`manta apps`: what Serve runs on a cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from manta.cli import output
from manta.cluster import record

if TYPE_CHECKING:
    from manta.serving.plan import App


@click.command(epilog=output.example("manta apps", "manta apps --json"))
@output.cluster_option
@output.json_option
def command(cluster: str, as_json: bool) -> None:
    """List the applications that Serve knows, with their replicas, and where they answer."""
    from manta.serving import deploy

    target = record.find(cluster)
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
