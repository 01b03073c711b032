"""`manta usage`: what teams, users and jobs have held, and for how long."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import click

from manta.cli import output

if TYPE_CHECKING:
    from manta.jobs.usage import By


@click.command(epilog=output.example("manta usage", "manta usage --by user --days 30 --json"))
@click.option(
    "--by", type=click.Choice(["team", "user", "job"]), default="team", show_default=True
)
@click.option(
    "--days",
    type=click.FloatRange(0, min_open=True),
    default=30.0,
    show_default=True,
    help="Back.",
)
@output.json_option
def command(by: str, days: float, as_json: bool) -> None:
    """Show resource-hours: what jobs asked for, times how long they ran. It is no bill."""
    from dataclasses import asdict

    from manta import state as states
    from manta.jobs import usage

    found = usage.report(states.open_state(), cast("By", by), states.now() - days * 86400)
    if as_json:
        output.print_json([{by: name, **asdict(held)} for name, held in found.items()])
        return
    if not found:
        output.say(f"no job has run in the last {days:g} days")
        return
    kinds = sorted({kind for held in found.values() for kind in held.resource_hours})
    rows = [
        (
            name,
            held.num_attempts,
            f"{held.hours:.2f}",
            f"{held.failed_hours:.2f}",
            *(f"{held.resource_hours.get(kind, 0.0):.2f}" for kind in kinds),
        )
        for name, held in found.items()
    ]
    columns = [by.upper(), "ATTEMPTS", "HOURS", "FAILED", *(f"{kind}-HOURS" for kind in kinds)]
    output.print_table(columns, rows)
