"""`manta run`: a pipeline, step after step."""

from __future__ import annotations

import secrets
import shlex
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from manta.cli import asked, output, watch
from manta.cluster import record
from manta.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from manta.cluster.record import ClusterRecord
    from manta.jobs.pipeline import Clients, StepResult
    from manta.plan.jobs import RunPlan, StepPlan


@click.command(
    epilog=output.example(
        "manta run configs/pipelines/quickstart.yaml",
        "manta run sweep.yaml --param dataset=quickstart",
        "manta run configs/pipelines/quickstart.yaml --resume quickstart-20260102-030405-ab12",
    )
)
@click.argument("pipeline", metavar="PIPELINE.yaml")
@click.option("--resume", metavar="RUN", help="Go on with a run; what succeeded is not redone.")
@click.option(
    "--skip-unchanged",
    is_flag=True,
    help="Take steps from earlier runs if code, config and the steps before are the same.",
)
@click.option("--param", "params", multiple=True, metavar="NAME=VALUE", help="Of the pipeline.")
@click.option("--working-dir", default=".", show_default=True, help="Folder to ship.")
@output.cluster_option
@output.dry_run_option
@output.json_option
def command(
    pipeline: str,
    resume: str | None,
    skip_unchanged: bool,
    params: tuple[str, ...],
    working_dir: str,
    cluster: str,
    dry_run: bool,
    as_json: bool,
) -> int:
    """Run the steps of PIPELINE.yaml in the order of their needs, each a Ray job or a deploy."""
    root = asked.folder(working_dir)
    given = dict(map(_param, params))
    if dry_run:
        plan = _plan(pipeline, root, resume, given)
        for step in plan.steps:
            click.echo(step.action.ray_command())
        return 0
    target = record.find(cluster)
    return _run(pipeline, root, resume, given, target, as_json, skip_unchanged)


def _param(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise InputError(f"--param {text}: not NAME=VALUE", "e.g. --param dataset=quickstart")
    return name, value


def _run(
    pipeline: str,
    root: Path,
    resume: str | None,
    given: Mapping[str, str],
    target: ClusterRecord,
    as_json: bool,
    skip_unchanged: bool,
) -> int:
    from manta.jobs import pipeline as pipelines

    target.use()
    plan = _plan(pipeline, root, resume, given)
    options = [f"--param={name}={value}" for name, value in given.items()]
    again = shlex.join(["manta", "run", pipeline, *options, "--resume", plan.run_id])
    previous = pipelines.load(plan.run_id) if resume else {}
    clients = _clients(target, root)
    pipelines.begin(plan) if not resume else None
    started = time.monotonic()
    watcher = _Terminal(len(plan.steps))
    try:
        results = pipelines.execute(
            plan, clients, watcher, previous, skip_unchanged=skip_unchanged
        )
    except KeyboardInterrupt:
        _leave(watcher, again)
        raise
    total_s = time.monotonic() - started
    if as_json:
        output.print_json(
            {"run_id": plan.run_id, "total_s": total_s, "steps": [asdict(r) for r in results]}
        )
    else:
        _print_summary(plan, results, total_s, target)
    if results[-1].succeeded:
        return 0
    output.say(f"Try the rest again: {again}")
    return 1


def _plan(pipeline: str, root: Path, resume: str | None, given: Mapping[str, str]) -> RunPlan:
    from manta.check import work
    from manta.jobs.pipeline import run_folder
    from manta.plan.jobs import plan_run

    spec = work.load_pipeline(pipeline, root, given)
    now = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    run_id = resume or f"{spec.name}-{now}-{secrets.token_hex(2)}"
    return plan_run(
        spec, run_id=run_id, working_dir=root, run_url=run_folder(run_id), environment={}
    )


def _clients(target: ClusterRecord, root: Path) -> Clients:
    from manta.jobs import pipeline as pipelines
    from manta.jobs import request, runs
    from manta.serving import deploy

    state = watch.open_state()
    return pipelines.Clients(
        prepare=pipelines.preparer(target, root),
        job=pipelines.through_queue(state, lambda: watch.keep(state)),
        deploy=lambda file: deploy.apply(target, file, output.say).url,
        note=lambda plan, results: runs.note(state, plan, results, request.actor()),
    )


def _leave(watcher: _Terminal, again: str) -> None:
    from manta.plan.jobs import JobPlan

    if watcher.current and isinstance(watcher.current.action, JobPlan):
        watch.leave(watcher.current.action.submission_id)
    output.say(f"Go on with the run: {again}")


def _print_summary(
    plan: RunPlan, results: Sequence[StepResult], total_s: float, target: ClusterRecord
) -> None:
    click.echo()
    output.print_table(
        ["STEP", "STATUS", "TIME"],
        [(result.name, result.status, watch.seconds(result.duration_s)) for result in results],
    )
    click.echo()
    output.print_table(
        ["STEP", "MADE", "WHERE"],
        [(result.name, name, url) for result in results for name, url in result.artifacts.items()],
    )
    click.echo(f"\nrun        {plan.run_id}, {watch.seconds(total_s)} in all")
    click.echo(f"dashboard  {target.dashboard_url}")
    click.echo(f"endpoint   {target.serve_url}")
    click.echo(f"storage    {target.storage_url}")


class _Terminal:
    """Shows a run: a line when a step starts and ends, its log indented between."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps
        self.current: StepPlan | None = None
        self._line_open = False

    def started(self, step: StepPlan, number: int) -> None:
        self.current = step
        output.say(click.style(f"[{number}/{self.num_steps}] {step.name}", bold=True))

    def log(self, text: str) -> None:
        for line in text.splitlines(keepends=True):
            click.echo(("" if self._line_open else "    ") + line, err=True, nl=False)
            self._line_open = not line.endswith("\n")

    def ended(self, result: StepResult, earlier: bool) -> None:
        self.current = None
        when = " earlier" if earlier else ""
        end = f"{result.name}: {result.status.lower()}{when} in {watch.seconds(result.duration_s)}"
        output.say(end if result.succeeded else f"{end}. {result.message.strip()}")
