"""`manta plan`: what clusters would launch for some work, what it costs, cheapest first."""

from __future__ import annotations

from pathlib import Path

import click

from manta.cli.output import example, json_option, print_json, print_table
from manta.errors import InputError

FILE = click.Path(dir_okay=False, path_type=Path)


@click.command(
    epilog=example(
        """manta plan cluster/aws.yaml --demand '{"GPU": 1}x6' --hours 3""",
        "manta plan cluster/aws.yaml cluster/gcp.yaml --job configs/train_job.yaml",
        """manta plan cluster/gcp.yaml --demand 'STRICT_SPREAD[{"GPU": 8}x2]' --json""",
    )
)
@click.argument("clusters", metavar="CLUSTER…", nargs=-1, required=True, type=FILE)
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
@json_option
def command(
    clusters: tuple[Path, ...],
    jobs: tuple[Path, ...],
    apps: tuple[Path, ...],
    shapes: tuple[str, ...],
    hours: float | None,
    prices: tuple[Path, ...],
    as_json: bool,
) -> None:
    """Show which nodes Ray would launch, what waits and why, price, energy and CO2e.

    Ray's own scheduler decides, offline. Without --job, --app or --demand: the minimum cluster.
    """
    from manta.plan.clusters import read_cluster
    from manta.plan.compare import cheapest_first
    from manta.plan.demand import demand_of_app, demand_of_job, parse_demand, total
    from manta.plan.explain import advise
    from manta.plan.nodes import plan_cluster
    from manta.plan.report import as_json as plan_as_json
    from manta.spec.catalog import default_paths, load_catalog

    if hours is not None and not 0 < hours < 1e6:
        raise InputError(f"--hours {hours:g}: must be above 0", "write e.g. --hours 3")
    catalog = load_catalog([*default_paths(), *prices])
    demand = total(
        [
            *map(demand_of_job, jobs),
            *map(demand_of_app, apps),
            *map(parse_demand, shapes),
        ]
    )
    plans = []
    for file in clusters:
        plan = plan_cluster(read_cluster(file, catalog), demand, catalog, hours=hours)
        plans.append(advise(plan, demand, catalog))
    ordered = cheapest_first(plans)
    if as_json:
        print_json({"plans": [plan_as_json(plan) for plan in ordered]})
        return
    _print(ordered)


def _print(plans: tuple[object, ...]) -> None:
    from manta.plan.nodes import Plan
    from manta.plan.report import COLUMNS, remarks, rows

    for index, plan in enumerate(plans):
        assert isinstance(plan, Plan)
        if len(plans) > 1:
            click.echo(f"{chr(10) if index else ''}{index + 1}. {plan.cluster.file}")
        where = f"{plan.cluster.cloud or plan.cluster.provider} {plan.cluster.region or ''}"
        click.echo(f"{plan.cluster.name}: {where.strip()}")
        print_table(COLUMNS, rows(plan))
        for remark in remarks(plan):
            click.echo(remark)
