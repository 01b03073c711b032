"""`manta submit`: one job, from a spec or a command."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import TYPE_CHECKING

import click

from manta.cli import asked, output, watch
from manta.errors import InputError

if TYPE_CHECKING:
    from manta.plan.jobs import JobPlan
    from manta.spec import JobSpec


@click.command(
    epilog=output.example(
        "manta submit configs/jobs/train.yaml",
        "manta submit --no-wait --priority high -- python jobs/prepare.py",
    )
)
@click.argument("job", nargs=-1, required=True, metavar="JOB.yaml | -- COMMAND…")
@click.option("--id", "job_id", metavar="ID", help="The job's id: same id, same job, run once.")
@click.option("--working-dir", default=".", show_default=True, help="Folder to ship.")
@click.option("--no-wait", is_flag=True, help="Return when the job is accepted.")
@click.option("--priority", type=click.Choice(["low", "normal", "high"]), help="[normal]")
@click.option("--team", metavar="NAME", help="Whose share and budget it counts against.")
@click.option("--max-retries", type=click.IntRange(0), help="After a lost node and the like. [3]")
@click.option("--timeout-s", type=click.FloatRange(0, min_open=True), help="For each attempt.")
@click.option("--deadline-s", type=click.FloatRange(0, min_open=True), help="From now to its end.")
@click.option("--budget-usd", type=click.FloatRange(0, min_open=True), help="Most it may cost.")
@output.cluster_option
@output.dry_run_option
@output.json_option
def command(
    job: tuple[str, ...],
    job_id: str | None,
    working_dir: str,
    no_wait: bool,
    cluster: str,
    dry_run: bool,
    as_json: bool,
    **queueing: object,
) -> int:
    """Submit JOB.yaml, or a command after `--`, and follow it until it ends.

    The job is written down before anything else happens: it, its code, its log and its result
    outlive this terminal and the cluster. Ctrl-C stops the following, not the job.
    """
    root = asked.folder(working_dir)
    spec = _with_options(asked.spec_of(job, root), queueing)
    plan = _plan(spec, job_id, root)
    if dry_run:
        click.echo(plan.ray_command())
        return 0
    from manta.jobs import request, store

    state = watch.open_state()
    budget_said = queueing["budget_usd"] is not None
    wanted = asked.request_of(
        state, plan, spec, root, cluster=cluster, file=job[0], budget_said=budget_said
    )
    accepted, new = store.submit(state, wanted, request.actor())
    if not new:
        output.say(f"{accepted.id} is known already; nothing was submitted")
    if no_wait:
        watch.print_job(state, accepted, as_json)
        return 0
    return watch.until_done(state, accepted.id, as_json=as_json)


def _with_options(spec: JobSpec, queueing: dict[str, object]) -> JobSpec:
    """What was said on the command line goes before what the file says."""
    from pydantic import ValidationError

    said = {name: value for name, value in queueing.items() if value is not None}
    retry = {"max_retries": said.pop("max_retries")} if "max_retries" in said else {}
    told = spec.model_dump(by_alias=True, exclude_unset=True) | said
    told["retry"] = spec.retry.model_dump(exclude_unset=True) | retry
    try:
        return type(spec).model_validate(told)
    except ValidationError as error:
        fault = error.errors()[0]
        option = str(fault["loc"][-1]).replace("_", "-")
        raise InputError(f"--{option} {fault['input']}: {fault['msg']}") from None


def _plan(spec: JobSpec, job_id: str | None, root: Path) -> JobPlan:
    from manta.plan.jobs import plan_job

    return plan_job(
        spec,
        spec.entrypoint,
        submission_id=job_id or f"{spec.name}-{secrets.token_hex(4)}",
        working_dir=root,
    )
