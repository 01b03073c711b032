"""`manta jobs`: what waits, runs and ran; on clusters that are gone too."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from manta.cli import output, watch
from manta.errors import MantaError

if TYPE_CHECKING:
    from manta.jobs.costs import Cost
    from manta.jobs.model import Job, JobRequest
    from manta.jobs.reports import Report

SECRET = ("TOKEN", "SECRET", "KEY", "PASSWORD", "CREDENTIAL")


@click.group(
    invoke_without_command=True,
    epilog=output.example(
        "manta jobs",
        "manta jobs --why train-1",
        "manta jobs --state queued --state running --json",
        "manta jobs show train-1",
    ),
)
@click.option("--state", "wanted", multiple=True, metavar="STATE", help="Only in this state.")
@click.option("--user", help="Only this user's.")
@click.option("--team", help="Only this team's.")
@click.option("--cluster", "--name", help="Only on this cluster.")
@click.option("--limit", type=click.IntRange(1), default=1000, show_default=True, help="Newest N.")
@click.option("--why", metavar="JOB", help="Say what this job waits for.")
@output.json_option
@click.pass_context
def command(
    context: click.Context,
    wanted: tuple[str, ...],
    user: str | None,
    team: str | None,
    cluster: str | None,
    limit: int,
    why: str | None,
    as_json: bool,
) -> None:
    """List jobs, oldest first; those of plain `ray job submit` too."""
    if context.invoked_subcommand is not None:
        return
    if why is not None:
        _say_why(why, as_json)
        return
    from manta.jobs import queries, unseen

    state = watch.open_state()
    states = queries.states(wanted)
    jobs = queries.listed(state, states=states, user=user, team=team, cluster=cluster, limit=limit)
    if user in (None, "ray") and team in (None, "default"):
        jobs += [
            job for job in unseen.all_of(state, cluster) if job.state in (states or (job.state,))
        ]
    if as_json:
        output.print_json([watch.as_json(job) for job in jobs])
    elif jobs:
        output.print_table(
            ["JOB", "STATUS", "TRY", "TIME", "USER", "CLUSTER", "ENTRYPOINT"],
            [
                (
                    job.id,
                    job.state,
                    job.attempt or "-",
                    watch.seconds(watch.duration_s(job)),
                    job.user,
                    job.cluster,
                    job.entrypoint,
                )
                for job in jobs
            ],
        )
    else:
        output.say("no jobs yet; submit one with `manta submit`")


def _say_why(job_id: str, as_json: bool) -> None:
    from manta.jobs import passes, queries

    state = watch.open_state()
    job = queries.get(state, job_id)
    if job.state == "QUEUED":
        reason = passes.explain(state, job)
    elif job.state.done:
        reason = job.message.strip() or f"it has {job.state.lower()}"
    else:
        reason = f"attempt {job.attempt} is on cluster `{job.cluster}`"
    if as_json:
        output.print_json({"id": job.id, "status": job.state, "why": reason})
    else:
        click.echo(f"{job.id} is {job.state}: {reason}")


@command.command(epilog=output.example("manta jobs show train-1a2b3c4d"))
@click.argument("job")
@output.json_option
def show(job: str, as_json: bool) -> None:
    """Tell JOB's story in order: what was asked for, each attempt, each event."""
    from manta.jobs import queries, spending

    state = watch.open_state()
    found = queries.get(state, job)
    cost = spending.of_job(state, found)
    request = _redacted(queries.request_of(state, job).model_dump())
    attempts = queries.attempts_of(state, job)
    events = queries.events_of(state, job_id=job)
    report = _report(queries.request_of(state, job))
    if as_json:
        story = {"request": request, "attempts": [asdict(a) for a in attempts]}
        story |= {"report": asdict(report)}
        story |= {"events": [asdict(e) for e in events], "cost": spending.as_json(cost)}
        output.print_json(watch.as_json(found) | story)
        return
    _print_head(found, request, _cost(cost))
    for name, value in {**report.metrics, **report.artifacts}.items():
        click.echo(f"{name:<12} {value}")
    click.echo()
    output.print_table(
        ["TRY", "STATUS", "RAY ID", "CLUSTER", "TIME", "EXIT", "CAUSE", "LOG"],
        [
            (
                a.number,
                a.state,
                a.submission_id,
                a.cluster,
                watch.seconds(a.ended_at - a.started_at if a.ended_at and a.started_at else None),
                "-" if a.exit_code is None else a.exit_code,
                a.cause or "-",
                a.log_state,
            )
            for a in attempts
        ],
    )
    click.echo()
    output.print_table(
        ["WHEN (UTC)", "WHO", "WHAT", ""],
        [(when(event.at), event.actor, event.kind, event.text) for event in events],
    )


def _report(request: JobRequest) -> Report:
    """What the job said of itself; nothing if the storage is away."""
    from manta.jobs import reports

    try:
        return reports.read(reports.url_of(request))
    except MantaError as error:
        output.say(f"its report cannot be read: {error}")
        return reports.Report()


def when(at: float) -> str:
    """A moment for people, in UTC."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S")


def _cost(cost: Cost) -> str:
    """What it cost, in one line: `0.42 USD, 0.1 kWh, 0.04 kgCO2e, 3600 node-seconds`."""
    from manta.cli.usage import shown

    names = {"usd": "USD", "kwh": "kWh", "kgco2e": "kgCO2e", "gpu_hours": "GPU-hours"}
    names["node_seconds"] = "node-seconds"
    return ", ".join(f"{shown(cost, name)} {unit}" for name, unit in names.items())


def _print_head(job: Job, request: dict[str, Any], cost: str) -> None:
    facts = {
        "job": job.id,
        "status": job.state,
        "command": job.entrypoint,
        "code": ", ".join(request["packages"]) or "-",
        "commit": request["code_version"] or "-",
        "user": f"{job.user}, team {job.team}",
        "cluster": job.cluster,
        "resources": request["resources"],
        "cost": cost,
        "environment": request["runtime_env_passthrough"].get("env_vars", {}),
        "manta": request["manta_version"] or "-",
    }
    if job.message:
        facts["message"] = job.message.strip()
    for name, value in facts.items():
        click.echo(f"{name:<12} {value}")


def _redacted(request: dict[str, Any]) -> dict[str, Any]:
    """The request without the values of variables whose names say that they are secret."""
    runtime_env = dict(request["runtime_env_passthrough"])
    if variables := runtime_env.get("env_vars"):
        runtime_env["env_vars"] = {
            name: "…" if any(word in name.upper() for word in SECRET) else value
            for name, value in variables.items()
        }
    return {**request, "runtime_env_passthrough": runtime_env}
