"""`manta submit`: one job, from a spec or a command."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from manta.cli import output, watch
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
    root = Path(working_dir).resolve()
    if not root.is_dir():
        raise InputError(f"--working-dir {working_dir} is not a folder")
    spec = _with_options(_spec(job, root), queueing)
    plan = _plan(spec, job_id, root)
    if dry_run:
        click.echo(plan.ray_command())
        return 0
    from manta.jobs import request, store

    state = watch.open_state()
    cluster = spec.clusters[0] if spec.clusters else cluster
    with _located(job[0], queueing), output.progress(f"submitting {plan.submission_id}"):
        asked = request.prepare(
            plan,
            spec,
            cluster=cluster,
            storage_url=request.storage_of(state, cluster),
            working_dir=root,
        )
        accepted, new = store.submit(state, asked, request.actor())
    if not new:
        output.say(f"{accepted.id} is known already; nothing was submitted")
    if no_wait:
        watch.print_job(state, accepted, as_json)
        return 0
    return watch.until_done(state, accepted.id, as_json=as_json)


@contextmanager
def _located(file: str, said: dict[str, object]) -> Iterator[None]:
    """A budget below the price is a fault of the line that gives it, if a file does."""
    from manta.errors import Finding, InvalidSpec
    from manta.jobs.own_budget import OverBudget
    from manta.spec.loading import read

    try:
        yield
    except OverBudget as error:
        if said["budget_usd"] is not None or not file.endswith((".yaml", ".yml")):
            raise
        line = read(file).line(("budget_usd",))
        fault = Finding(file=file, line=line, what=error.what, fix=error.fix, rule="budget")
        raise InvalidSpec([fault]) from None


def _spec(job: tuple[str, ...], root: Path) -> JobSpec:
    import shlex

    from manta.check import work
    from manta.spec import JobSpec

    if len(job) == 1 and job[0].endswith((".yaml", ".yml")):
        return work.load_job(job[0], root)
    return JobSpec(name="job", entrypoint=shlex.join(job))


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
