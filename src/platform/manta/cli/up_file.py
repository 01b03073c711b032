"""`manta up FILE.yaml`: check, plan, ask, launch."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from manta import storage
from manta.cli import output, watch
from manta.errors import InputError, InvalidSpec

if TYPE_CHECKING:
    from manta.cluster.launcher import LaunchPlan
    from manta.plan.nodes import Plan

TIMEOUT_S = 1800.0

# What plain `ray up` would leave open, and the derived file closes.
CLOSED_HERE = (
    "cluster-auth-off",
    "cluster-auth-partial",
    "cluster-token-not-shipped",
    "cluster-dashboard-open",
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What was asked for on the command line."""

    name: str | None
    yes: bool
    tls: bool
    prices: tuple[Path, ...]
    keep: bool
    timeout_s: float
    dry_run: bool
    as_json: bool


def run(file: Path, options: Options) -> None:
    """Launch the cluster that a Ray cluster YAML describes."""
    from manta.cluster import launch, launcher

    _check(file)
    nodes = _nodes(file, options.prices)
    looked_up = launch.options_here(
        options.name or _name(nodes), file, _read(file), with_tls=options.tls
    )
    looked_up = replace(launch.with_resources(looked_up), prices=options.prices)
    plan = launcher.plan_launch(looked_up)
    launch.require_hosts_free(plan)
    if options.dry_run:
        _print_dry(plan, nodes, options.as_json)
        return
    _show(plan, nodes)
    _ask(plan, options.yes)
    name = plan.record.name
    try:
        with output.progress(f"Launching cluster `{name}`") as tell:
            record = launch.execute(plan, options.timeout_s, tell, keep=options.keep)
    except KeyboardInterrupt:
        output.say(f"Cluster `{name}` is left as it is, and may cost money.")
        output.say(f"Go on:  manta up {file} --name {name}")
        output.say(f"End it: manta down --name {name}")
        raise
    watch.note("cluster up", f"{name}: {file}", name)
    if options.as_json:
        output.print_json(asdict(record))
    else:
        output.print_cluster(record)


def _check(file: Path) -> None:
    """Print what `manta check` finds; raise InvalidSpec if there is an error among it."""
    from manta import check

    findings = [each for each in check.files([file]) if each.rule not in CLOSED_HERE]
    errors = [finding for finding in findings if finding.severity == "error"]
    if errors:
        raise InvalidSpec(errors)
    for finding in findings:
        if finding.severity == "warning":
            output.say(f"Warning: {finding}")


def _read(file: Path) -> dict[str, object]:
    from manta.spec import read

    value = dict(read(file).value)
    if not isinstance(value.get("provider"), dict):
        raise InputError(f"{file} is not a Ray cluster YAML: it has no provider")
    return value


def _nodes(file: Path, prices: tuple[Path, ...]) -> Plan:
    """The minimum cluster: what is launched before anybody asks for anything."""
    from manta.plan.clusters import read_cluster
    from manta.plan.demand import Demand
    from manta.plan.nodes import plan_cluster
    from manta.spec.catalog import default_paths, load_catalog

    catalog = load_catalog([*default_paths(), *prices])
    return plan_cluster(read_cluster(file, catalog), Demand(), catalog)


def _name(nodes: Plan) -> str:
    """The file's cluster_name, where it can be a name."""
    return nodes.cluster.name.lower().replace("_", "-")


def _show(plan: LaunchPlan, nodes: Plan) -> None:
    from manta.plan.report import COLUMNS, remarks, rows

    where = f"{nodes.cluster.cloud or nodes.cluster.provider} {nodes.cluster.region or ''}"
    output.say(f"Cluster `{plan.record.name}`: {where.strip()}; at the least:")
    output.say_table(COLUMNS, rows(nodes))
    for remark in remarks(nodes):
        output.say(remark)
    output.say(f"Up to {nodes.cluster.max_workers} workers when work asks for them.")
    if storage.ROOT_VARIABLE not in plan.config_text:
        output.say(
            f"Note: results go to {plan.record.storage_url} on whatever host makes them; set "
            f"{storage.ROOT_VARIABLE} to a URL that all of them reach, e.g. s3://bucket/team"
        )


def _ask(plan: LaunchPlan, yes: bool) -> None:
    launched = plan.record.launched
    assert launched
    if launched.is_up:
        output.say("It is up already: Ray is restarted on its head if the file has changed.")
    if yes:
        return
    if not sys.stdin.isatty():
        raise InputError("nobody to ask", "launch with --yes")
    if not click.confirm("Launch it?", err=True):
        raise InputError("nothing was launched")


def _print_dry(plan: LaunchPlan, nodes: Plan, as_json: bool) -> None:
    from manta.plan.report import as_json as plan_as_json

    if as_json:
        value = {"command": plan.command(), "config": plan.config_text, "added": plan.added}
        output.print_json({**value, "plan": plan_as_json(nodes)})
        return
    _show(plan, nodes)
    click.echo(plan.command())
    for line in plan.added:
        click.echo(f"# {line}")
    click.echo(plan.config_text, nl=False)
