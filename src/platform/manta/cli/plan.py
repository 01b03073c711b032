"""`manta plan`: what clusters would launch and cost, and whether models fit their accelerators."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from manta.cli.output import example, json_option, print_json, print_table, say
from manta.errors import InputError

if TYPE_CHECKING:
    from manta.plan.clusters import Cluster
    from manta.plan.models import ModelPlan
    from manta.plan.nodes import Plan

FILE = click.Path(dir_okay=False, path_type=Path)


@click.command(
    epilog=example(
        """manta plan cluster/aws.yaml --demand '{"GPU": 1}x6' --hours 3""",
        "manta plan cluster/aws.yaml cluster/gcp.yaml --job configs/train_job.yaml",
        """manta plan cluster/gcp.yaml --demand 'STRICT_SPREAD[{"GPU": 8}x2]' --json""",
        "manta plan configs/models/llama-8b.yaml",
    )
)
@click.argument("files", metavar="CLUSTER|SERVE…", nargs=-1, required=True, type=FILE)
@click.option("--job", "jobs", multiple=True, type=FILE, help="Plan for a job spec.")
@click.option("--app", "apps", multiple=True, type=FILE, help="Plan for a Serve config.")
@click.option(
    "--demand", "shapes", multiple=True, metavar="SHAPE", help="""Resources: '{"GPU": 1}x6'."""
)
@click.option(
    "--hours", "--duration", "hours", type=float, help="How long it runs; adds cost for the run."
)
@click.option(
    "--prices", multiple=True, type=FILE, help="Your prices, laid over the built-in ones."
)
@click.option(
    "--model-config",
    "model_configs",
    multiple=True,
    metavar="SOURCE=FILE",
    help="The config.json of a model_source of the Serve config.",
)
@click.option(
    "--accelerator",
    "accelerators",
    multiple=True,
    metavar="NAME",
    help="Reckon models on this accelerator, not the file's: L4, H100 …",
)
@json_option
def command(
    files: tuple[Path, ...],
    jobs: tuple[Path, ...],
    apps: tuple[Path, ...],
    shapes: tuple[str, ...],
    hours: float | None,
    prices: tuple[Path, ...],
    model_configs: tuple[str, ...],
    accelerators: tuple[str, ...],
    as_json: bool,
) -> None:
    """Show which nodes Ray would launch, what waits and why, price, energy and CO2e.

    Ray's own scheduler decides, offline. Without --job, --app or --demand: the minimum cluster.
    Of the language models of Serve configs: whether weights and KV cache fit, how many sequences,
    and how fast a token can come at best.
    """
    from manta.plan.models import as_json as model_as_json
    from manta.plan.report import as_json as plan_as_json

    if hours is not None and not 0 < hours < 1e6:
        raise InputError(f"--hours {hours:g}: must be above 0", "write e.g. --hours 3")
    clusters = [file for file in files if not _is_serve(file)]
    serves = [*apps, *(file for file in files if file not in clusters)]
    if not clusters and (jobs or shapes):
        raise InputError("--job and --demand need a cluster file", "name one before them")
    read, plans = _clusters(clusters, jobs, serves, shapes, hours, prices)
    models = _models(serves, model_configs, read, accelerators)
    if as_json:
        told = {"plans": [plan_as_json(plan) for plan in plans]}
        print_json(told | {"models": [model_as_json(model) for model in models]})
        return
    _print(plans)
    _print_models(models)
    if serves and not clusters and not models:
        say("no language models in it; name a cluster file beside it to plan its nodes")


def _is_serve(file: Path) -> bool:
    from manta.spec import read

    return "applications" in read(file).value


def _clusters(
    files: list[Path],
    jobs: tuple[Path, ...],
    apps: list[Path],
    shapes: tuple[str, ...],
    hours: float | None,
    prices: tuple[Path, ...],
) -> tuple[list[Cluster], tuple[Plan, ...]]:
    """The clusters as read, and the plans for all that is asked of each, cheapest first."""
    from manta.plan.clusters import read_cluster
    from manta.plan.compare import cheapest_first
    from manta.plan.demand import demand_of_app, demand_of_job, parse_demand, total
    from manta.plan.explain import advise
    from manta.plan.nodes import plan_cluster
    from manta.spec.catalog import default_paths, load_catalog

    if not files:
        return [], ()
    catalog = load_catalog([*default_paths(), *prices])
    demand = total(
        [
            *map(demand_of_job, jobs),
            *map(demand_of_app, apps),
            *map(parse_demand, shapes),
        ]
    )
    clusters = [read_cluster(file, catalog) for file in files]
    plans = []
    for cluster in clusters:
        plan = plan_cluster(cluster, demand, catalog, hours=hours)
        plans.append(advise(plan, demand, catalog))
    return clusters, cheapest_first(plans)


def _models(
    files: list[Path],
    given: Iterable[str],
    clusters: list[Cluster],
    accelerators: tuple[str, ...],
) -> list[ModelPlan]:
    from manta.plan.models import plan_models

    configs = dict(map(_model_config, given))

    def config_of(source: str) -> Path | None:
        return configs.get(source) or _trained(source)

    return [
        plan
        for file in files
        for plan in plan_models(
            file,
            root=Path.cwd(),
            config_of=config_of,
            clusters=clusters,
            accelerators=accelerators,
        )
    ]


def _model_config(text: str) -> tuple[str, Path]:
    source, equals, file = text.rpartition("=")
    if not equals or not source or not Path(file).is_file():
        fix = "write --model-config SOURCE=FILE with the model's config.json"
        raise InputError(f"--model-config {text}: no such file", fix)
    return source, Path(file)


def _trained(name: str) -> Path | None:
    """The config.json of a model in the storage, if that is a folder of this machine."""
    from manta import storage
    from manta.workloads import layout

    if "/" in name:
        return None
    try:
        url = storage.join(layout.model(name), "config.json")
    except InputError:  # an alias that is not there yet
        return None
    path = Path(url.removeprefix("file://"))
    return path if path.is_file() else None


def _print(plans: tuple[Plan, ...]) -> None:
    from manta.plan.report import COLUMNS, remarks, rows

    for index, plan in enumerate(plans):
        if len(plans) > 1:
            click.echo(f"{chr(10) if index else ''}{index + 1}. {plan.cluster.file}")
        where = f"{plan.cluster.cloud or plan.cluster.provider} {plan.cluster.region or ''}"
        click.echo(f"{plan.cluster.name}: {where.strip()}")
        print_table(COLUMNS, rows(plan))
        for remark in remarks(plan):
            click.echo(remark)


def _print_models(models: list[ModelPlan]) -> None:
    from manta.plan.models import words

    for model in models:
        for line in words(model):
            click.echo(line)
