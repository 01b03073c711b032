"""`manta render kuberay`: Kubernetes manifests from a Ray cluster YAML."""

from __future__ import annotations

from pathlib import Path

import click

from manta.cli.output import example, say
from manta.errors import InputError

FILE = click.Path(dir_okay=False, path_type=Path)


@click.group()
def command() -> None:
    """Write a cluster for another launcher."""


@command.command(
    epilog=example(
        "manta render kuberay cluster/aws.yaml > raycluster.yaml",
        "manta render kuberay cluster/gcp.yaml --app serve_apps/llm-gpu.yaml | kubectl apply -f -",
    )
)
@click.argument("cluster", type=FILE)
@click.option("--job", type=FILE, help="Render a RayJob that runs this job spec.")
@click.option("--app", type=FILE, help="Render a RayService that serves this Serve config.")
@click.option("--prices", multiple=True, type=FILE, help="Machine sizes that the catalogue lacks.")
def kuberay(cluster: Path, job: Path | None, app: Path | None, prices: tuple[Path, ...]) -> None:
    """Print a RayCluster, or with --job a RayJob, with --app a RayService.

    What has no counterpart in KubeRay is listed: in a comment on top, and on stderr.
    """
    from manta.plan.clusters import read_cluster
    from manta.plan.kuberay import render_cluster, render_job, render_service
    from manta.spec import JobSpec, load
    from manta.spec.catalog import default_paths, load_catalog

    if job and app:
        raise InputError("--job and --app at once", "render one manifest at a time")
    catalog = load_catalog([*default_paths(), *prices])
    read = read_cluster(cluster, catalog)
    if job:
        rendered = render_job(read, catalog, load(job, JobSpec))
    elif app:
        rendered = render_service(read, catalog, app)
    else:
        rendered = render_cluster(read, catalog)
    click.echo(rendered.to_yaml(), nl=False)
    for item in rendered.missing:
        say(f"no counterpart: {item}")
