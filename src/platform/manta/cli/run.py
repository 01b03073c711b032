"""`manta run`: a pipeline, which the controller walks step by step."""

from __future__ import annotations

import secrets
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from manta.cli import asked, output, watch, watch_run
from manta.cluster import record
from manta.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from manta.cluster.record import ClusterRecord
    from manta.jobs.run_request import RunRequest
    from manta.plan.jobs import RunPlan


@click.command(
    epilog=output.example(
        "manta run configs/pipelines/quickstart.yaml",
        "manta run sweep.yaml --param dataset=quickstart --no-wait",
        "manta run configs/pipelines/quickstart.yaml --resume quickstart-20260102-030405-ab12",
    )
)
@click.argument("pipeline", metavar="PIPELINE.yaml")
@click.option(
    "--resume",
    metavar="RUN",
    help="Go on with a run that failed, with the files as they are now.",
)
@click.option(
    "--skip-unchanged",
    is_flag=True,
    help="Take steps from earlier runs if code, config and the steps before are the same.",
)
@click.option("--param", "params", multiple=True, metavar="NAME=VALUE", help="Of the pipeline.")
@click.option("--working-dir", default=".", show_default=True, help="Folder to ship.")
@click.option("--no-wait", is_flag=True, help="Return when it is accepted.")
@output.cluster_option
@output.dry_run_option
@output.json_option
def command(
    pipeline: str,
    resume: str | None,
    skip_unchanged: bool,
    params: tuple[str, ...],
    working_dir: str,
    no_wait: bool,
    cluster: str,
    dry_run: bool,
    as_json: bool,
) -> int:
    """Run the steps of PIPELINE.yaml, each a Ray job or a deploy, when what they need is done.

    The controller walks the run: it goes on when this command is interrupted.
    """
    root = asked.folder(working_dir)
    given = dict(map(param, params))
    if dry_run:
        for step in _plan(pipeline, root, resume, given).steps:
            click.echo(step.action.ray_command())
        return 0
    target = record.find(cluster)
    wanted = request_of(
        pipeline, root, given, target, run_id=resume, skip_unchanged=skip_unchanged
    )
    return _run(wanted, resume=resume is not None, no_wait=no_wait, as_json=as_json)


def param(text: str) -> tuple[str, str]:
    """`NAME=VALUE` in two. Raises InputError for anything else."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise InputError(f"--param {text}: not NAME=VALUE", "e.g. --param dataset=quickstart")
    return name, value


def request_of(
    pipeline: str,
    root: Path,
    given: Mapping[str, str],
    target: ClusterRecord,
    *,
    run_id: str | None = None,
    skip_unchanged: bool = False,
) -> RunRequest:
    """What running the file asks for, its code shipped; under a new id if `run_id` is None.

    Raises:
        InvalidSpec: the pipeline, or a Serve config of it, has faults.
        InputError: a parameter is wrong, or a step could never run on the cluster.
    """
    from manta.jobs import run_request
    from manta.plan.jobs import DeployAction
    from manta.serving.apps import config

    target.use()
    plan = _plan(pipeline, root, run_id, given)
    for step in plan.steps:
        if isinstance(step.action, DeployAction):
            config.read(str(root / step.action.file))
    with output.progress(f"preparing {plan.run_id}"):
        return run_request.prepare(
            plan,
            cluster=target.name,
            storage_url=target.storage_url,
            working_dir=root,
            skip_unchanged=skip_unchanged,
        )


def _run(wanted: RunRequest, *, resume: bool, no_wait: bool, as_json: bool) -> int:
    from manta.jobs import request, runs
    from manta.jobs.resume import resume as resume_run

    state = watch.open_state()
    known = watch_run.attempts(state, wanted.id) if resume else {}
    if resume:
        resume_run(state, wanted.id, request.actor(), wanted)
    else:
        runs.submit(state, wanted, request.actor())
    if no_wait:
        output.print_json({"run_id": wanted.id}) if as_json else click.echo(wanted.id)
        return 0
    return watch_run.until_done(state, wanted.id, as_json=as_json, after_attempts=known)


def _plan(pipeline: str, root: Path, run_id: str | None, given: Mapping[str, str]) -> RunPlan:
    from manta import storage
    from manta.check import work
    from manta.plan.jobs import plan_run

    spec = work.load_pipeline(pipeline, root, given)
    now = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    name = run_id or f"{spec.name}-{now}-{secrets.token_hex(2)}"
    url = storage.join(storage.root(), "runs", name)
    return plan_run(spec, run_id=name, working_dir=root, run_url=url, environment={})
