"""`manta submit`: one job, from a spec or a command."""

from __future__ import annotations

import secrets
from pathlib import Path

import click

from manta.cli import output, watch
from manta.cluster import record
from manta.errors import InputError
from manta.plan.jobs import JobPlan


@click.command(
    epilog=output.example(
        "manta submit configs/jobs/train.yaml",
        "manta submit -- python jobs/prepare.py --config configs/prepare.yaml",
    )
)
@click.argument("job", nargs=-1, required=True, metavar="JOB.yaml | -- COMMAND…")
@click.option("--id", "job_id", metavar="ID", help="The job's id: same id, same job, run once.")
@click.option("--working-dir", default=".", show_default=True, help="Folder to ship.")
@click.option("--no-wait", is_flag=True, help="Return when the job is accepted.")
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
) -> int:
    """Submit JOB.yaml, or a command after `--`, and follow it until it ends.

    Ctrl-C stops the following, not the job.
    """
    plan = _plan(job, job_id, Path(working_dir))
    if dry_run:
        click.echo(plan.ray_command())
        return 0
    from manta.jobs import ray_api

    client = ray_api.connect(record.find(cluster))
    with output.progress(f"submitting {plan.submission_id}"):
        new = ray_api.submit(client, plan)
    if not new:
        output.say(f"{plan.submission_id} is known already; nothing was submitted")
    if no_wait:
        watch.print_job(ray_api.get(client, plan.submission_id), as_json)
        return 0
    return watch.until_done(client, plan.submission_id, as_json=as_json)


def _plan(job: tuple[str, ...], job_id: str | None, working_dir: Path) -> JobPlan:
    import shlex

    from manta.check import work
    from manta.plan.jobs import plan_job
    from manta.spec import JobSpec

    root = working_dir.resolve()
    if not root.is_dir():
        raise InputError(f"--working-dir {working_dir} is not a folder")
    if len(job) == 1 and job[0].endswith((".yaml", ".yml")):
        spec = work.load_job(job[0], root)
    else:
        spec = JobSpec(name="job", entrypoint=shlex.join(job))
    return plan_job(
        spec,
        spec.entrypoint,
        submission_id=job_id or f"{spec.name}-{secrets.token_hex(4)}",
        working_dir=root,
    )
