"""`manta cron`: jobs and pipelines that come again."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click

from manta.cli import asked, output, watch
from manta.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

    from manta.jobs.cron import Entry
    from manta.jobs.model import JobRequest
    from manta.jobs.run_request import RunRequest


@click.group(
    invoke_without_command=True,
    epilog=output.example(
        "manta cron", "manta cron add nightly '30 3 * * *' configs/jobs/train.yaml"
    ),
)
@output.json_option
@click.pass_context
def command(context: click.Context, as_json: bool) -> None:
    """Show the jobs and pipelines that come again, and when next."""
    if context.invoked_subcommand is not None:
        return
    from manta import state as states
    from manta.jobs import cron

    at, entries = states.now(), cron.load(states.open_state())
    if as_json:
        told = [
            {
                "name": entry.name,
                "line": entry.line,
                "timezone": entry.timezone,
                "next_at": entry.next(at),
                "last_id": entry.last_id,
                "cluster": entry.request.cluster,
                "entrypoint": _what(entry),
            }
            for entry in entries
        ]
        output.print_json(told)
        return
    rows = [
        (
            entry.name,
            f"{entry.line} {entry.timezone}",
            _shown(entry.next(at)),
            entry.last_id or "-",
            _what(entry),
        )
        for entry in entries
    ]
    if rows:
        output.print_table(["NAME", "WHEN", "NEXT", "NEWEST", "WHAT"], rows)
    else:
        output.say("nothing comes again; see `manta cron add --help`")


@command.command(
    "add",
    epilog=output.example(
        "manta cron add nightly '30 3 * * *' configs/jobs/train.yaml",
        "manta cron add weekly '0 4 * * 1' configs/pipelines/quickstart.yaml",
        "manta cron add hourly '0 * * * *' --timezone Europe/Berlin -- python jobs/prepare.py",
    ),
)
@click.argument("name")
@click.argument("line", metavar="'M H DOM MON DOW'")
@click.argument("job", nargs=-1, required=True, metavar="JOB.yaml | PIPELINE.yaml | -- COMMAND…")
@click.option("--timezone", default="UTC", show_default=True, help="In which the line is read.")
@click.option("--param", "params", multiple=True, metavar="NAME=VALUE", help="Of the pipeline.")
@click.option(
    "--working-dir", default=".", show_default=True, help="Folder to ship, as it is now."
)
@output.cluster_option
@output.json_option
def add(
    name: str,
    line: str,
    job: tuple[str, ...],
    timezone: str,
    params: tuple[str, ...],
    working_dir: str,
    cluster: str,
    as_json: bool,
) -> None:
    """Submit a job or begin a run at each time of a cron line, as NAME-TIME.

    It replaces the entry of that name. The controller does it (`manta queue`), and goes on running
    for it. The code is shipped now: add it again to change it. A time whose predecessor still runs
    is left out.
    """
    from manta import state as states
    from manta.jobs import cron, request

    cron.check_name(name)
    cron.check_line(line, timezone)
    wanted = _wanted(name, job, asked.folder(working_dir), params, cluster)
    entry = cron.Entry(
        name=name,
        line=line,
        timezone=timezone,
        request=wanted,
        actor=request.actor(),
        checked_at=states.now(),
        last_id="",
    )
    cron.put(states.open_state(), entry)
    next_at = entry.next(states.now())
    if as_json:
        output.print_json({"name": name, "next_at": next_at})
    else:
        output.say(f"{name}: next at {_shown(next_at)}")


def _wanted(
    name: str, job: tuple[str, ...], root: Path, params: tuple[str, ...], cluster: str
) -> JobRequest | RunRequest:
    from manta.cli import run
    from manta.cluster import record
    from manta.plan.jobs import plan_job

    if asked.is_pipeline(job):
        given = dict(map(run.param, params))
        return run.request_of(job[0], root, given, record.find(cluster), run_id=name)
    if params:
        raise InputError("--param is for pipelines")
    spec = asked.spec_of(job, root)
    plan = plan_job(spec, spec.entrypoint, submission_id=name, working_dir=root)
    return asked.request_of(watch.open_state(), plan, spec, root, cluster=cluster, file=job[0])


def _what(entry: Entry) -> str:
    from manta.jobs.run_request import RunRequest

    if isinstance(entry.request, RunRequest):
        return f"pipeline {entry.request.pipeline}, {len(entry.request.steps)} steps"
    return entry.request.entrypoint


@command.command("remove", epilog=output.example("manta cron remove nightly"))
@click.argument("name")
@output.json_option
def remove(name: str, as_json: bool) -> None:
    """Submit it no more; jobs that were submitted go on."""
    from manta import state as states
    from manta.jobs import cron, request

    cron.remove(states.open_state(), name, request.actor())
    if as_json:
        output.print_json({"name": name})


def _shown(at: float) -> str:
    return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M} UTC"
