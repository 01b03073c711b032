"""`manta deploy`: apply a Serve config, wait until it answers, and go back if it does not."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar

import click

from manta.cli import output, watch
from manta.cluster import record
from manta.errors import InputError

if TYPE_CHECKING:
    from manta.serving.apps.plan import DeployPlan
    from manta.serving.rollout import Options

Command = TypeVar("Command", bound=Callable[..., Any])


def safety_options(command: Command) -> Command:
    """The options that `deploy` and `rollback` share."""
    options = (
        click.option(
            "--timeout-s",
            type=click.FloatRange(min=0, min_open=True),
            default=900.0,
            show_default=True,
            help="Longest wait for it to be healthy.",
        ),
        click.option(
            "--no-rollback", is_flag=True, help="If it fails, leave it; else what ran is restored."
        ),
        click.option(
            "--interrupt",
            is_flag=True,
            help="Stop old replicas before new ones are ready: without room for both.",
        ),
        click.option(
            "--check",
            metavar="PROBES.jsonl",
            help="Ask a candidate these questions first; go on only if it answers as they say.",
        ),
        click.option(
            "--observe-s",
            type=click.FloatRange(min=0),
            default=0.0,
            show_default=True,
            help="Compare it with the version before for so long, once users ask it.",
        ),
        click.option(
            "--max-error-rate",
            type=click.FloatRange(0, 1),
            default=0.01,
            show_default=True,
            help="With --observe-s and --canary: share of requests by which more may fail.",
        ),
        click.option(
            "--max-latency-ratio",
            type=click.FloatRange(min=1),
            default=1.5,
            show_default=True,
            help="With --observe-s and --canary: p95 of the time to the first byte, new over old.",
        ),
        click.option(
            "--canary",
            metavar="PERCENT,…",
            help="Let it answer so much first, step by step, e.g. 10,50; 100 is blue/green.",
        ),
        click.option(
            "--shadow",
            type=click.FloatRange(0, 1),
            default=0.0,
            help="Before that, ask it copies of this share of the requests.",
        ),
        click.option(
            "--step-s",
            type=click.FloatRange(min=1),
            default=60.0,
            show_default=True,
            help="With --canary and --shadow: shortest time of a step.",
        ),
        click.option(
            "--min-requests",
            type=click.IntRange(min=0),
            default=20,
            show_default=True,
            help="It fails if a step of three times that length brings it fewer; 0: go on.",
        ),
        click.option(
            "--canary-by",
            type=click.Choice(["key", "request"]),
            default="key",
            show_default=True,
            help="Draw clients by their API key, or each request.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


@click.command(
    epilog=output.example(
        "manta deploy serve_apps/llm.yaml",
        "manta deploy serve_apps/llm.yaml --check probes.jsonl --canary 10,50",
    )
)
@click.argument("file", metavar="SERVE.yaml")
@safety_options
@output.cluster_option
@output.dry_run_option
@output.json_option
def command(file: str, cluster: str, dry_run: bool, as_json: bool, **safety: Any) -> None:
    """Deploy the applications of SERVE.yaml, a native Ray Serve config, and wait for them.

    Applications that the file does not name stay as they are. If one of the file does not become
    healthy, what ran before is restored.
    """
    options = options_of(**safety)
    plan = _plan(file, cluster, options.interrupt) if dry_run else _execute(file, cluster, options)
    if as_json:
        facts = asdict(plan)
        del facts["body_passthrough"]  # may hold secrets of other applications
        output.print_json(facts)
    elif dry_run:
        _print(plan)


def options_of(*, no_rollback: bool, check: str | None, **others: Any) -> Options:
    """The shared options as a value. Raises InputError if one of them cannot be meant."""
    from manta.serving.rollout import Options
    from manta.spec.probes import read_probes

    probes = read_probes(check) if check else ()
    steps = {name: others.pop(name) for name in ("shadow", "step_s", "min_requests")}
    weights, by = others.pop("canary"), others.pop("canary_by")
    canary = None
    if weights is not None or steps["shadow"]:
        from manta.serving.canary.canary import Canary

        limits = {name: others[name] for name in ("max_error_rate", "max_latency_ratio")}
        canary = Canary(weights=_weights(weights), by=by, **steps, **limits)
    return Options(go_back=not no_rollback, probes=probes, canary=canary, **others)


def _weights(text: str | None) -> tuple[float, ...]:
    """`10,50` as shares of 1."""
    if text is None:
        return ()
    try:
        percents = [float(part.strip().removesuffix("%")) for part in text.split(",")]
    except ValueError:
        percents = []
    rises = all(low < high for low, high in itertools.pairwise([0.0, *percents]))
    if not percents or not rises or percents[-1] > 100:
        raise InputError(
            f"--canary {text}: not rising percents up to 100", "write e.g. --canary 10,50"
        )
    return tuple(percent / 100 for percent in percents)


def _plan(file: str, cluster: str, interrupt: bool) -> DeployPlan:
    from manta.serving.apps import config, deploy
    from manta.serving.apps.plan import ServeState, plan_deploy

    try:
        target = record.find(cluster)
    except InputError:
        wanted = config.read(file)
        output.say(f"no cluster `{cluster}` is up: as if nothing ran")
        return plan_deploy(
            ServeState(),
            wanted,
            serve_host=wanted.http_host or "127.0.0.1",
            serve_port=wanted.http_port or 8000,
        )
    target.use()
    wanted = deploy.read(target, file)
    return deploy.plan(target, wanted, deploy.state(target), surge=not interrupt)


def _execute(file: str, cluster: str, options: Options) -> DeployPlan:
    from manta.serving import rollout

    target = record.find(cluster)
    target.use()
    plan = rollout.deploy_file(target, file, output.say, options)
    watch.note("deployed", f"{', '.join(plan.names)} of {file}", cluster)
    return plan


def _print(plan: DeployPlan) -> None:
    click.echo(plan.serve_command())
    for note in plan.notes:
        click.echo(f"# {note}")
    for what in ("added", "changed", "unchanged", "kept"):
        if names := getattr(plan, what):
            click.echo(f"{what:9} {', '.join(names)}")
    for name, lines in plan.differences.items():
        for line in lines:
            click.echo(f"  {name}: {line}")
    click.echo(f"{'url':9} {plan.url}")
