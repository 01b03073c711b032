"""`manta attach`: a cluster that others started."""

from __future__ import annotations

import click

from manta.cli import output, watch


@click.command(
    epilog=output.example(
        "manta attach http://raycluster-head-svc:8265 --name gpu --storage s3://bucket/team",
        "manta attach http://127.0.0.1:8265 --name gpu --token-file ~/.ray/auth_token",
    )
)
@click.argument("dashboard_url", metavar="URL")
@click.option("--name", required=True, help="What it is called here.")
@click.option("--token-file", default="", help="File with its token. [none is asked for]")
@click.option("--serve-url", default="", help="Of Serve's proxy. [port 8000 of the same host]")
@click.option("--storage", default=None, help="Root of what jobs keep. [$MANTA_STORAGE]")
@output.json_option
def command(
    dashboard_url: str,
    name: str,
    token_file: str,
    serve_url: str,
    storage: str | None,
    as_json: bool,
) -> None:
    """Make the Ray cluster known whose dashboard is at URL: of KubeRay, `ray up`, `ray start`.

    Jobs, runs and deploys go there with `--name`; jobs that come with plain `ray job submit` are
    seen and kept. Manta neither starts nor ends it, and does not know what its machines cost.
    """
    from manta import storage as storages
    from manta.cluster import attach

    found = attach.attach(
        name,
        dashboard_url,
        token_path=token_file,
        serve_url=serve_url,
        storage_url=storage or storages.root(),
    )
    watch.note("cluster attached", f"{name}: {found.dashboard_url}", name)
    if as_json:
        output.print_json({"cluster": name, "dashboard_url": found.dashboard_url})
    else:
        output.say(f"cluster `{name}` is known; see `manta status --name {name}`")
