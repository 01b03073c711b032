"""`manta events`: what happened, in order; the audit trail."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from manta.cli import output, watch
from manta.cli.jobs import when


@click.command(
    epilog=output.example(
        "manta events", "manta events train-1", "manta events --jsonl > all.jsonl"
    )
)
@click.argument("job", required=False)
@click.option("--limit", type=click.IntRange(1), default=1000, show_default=True, help="Newest N.")
@click.option("--jsonl", is_flag=True, help="All of them, one JSON object a line, for export.")
@output.json_option
def command(job: str | None, limit: int, jsonl: bool, as_json: bool) -> None:
    """Print what happened, oldest first: to JOB, or to everything.

    Who did what, when, to which job. Events are written with the change that they tell of, and
    never altered.
    """
    from manta.jobs import queries

    state = watch.open_state()
    if job is not None:
        queries.get(state, job)
    events = queries.events_of(state, job_id=job, limit=None if jsonl else limit)
    if jsonl:
        for event in events:
            click.echo(json.dumps(asdict(event)))
    elif as_json:
        output.print_json([asdict(event) for event in events])
    else:
        output.print_table(
            ["WHEN (UTC)", "WHO", "JOB", "WHAT", ""],
            [(when(e.at), e.actor, e.job_id or "-", e.kind, e.text) for e in events],
        )
