"""`manta budget`: what teams may spend in a period."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import click

from manta.cli import output

if TYPE_CHECKING:
    from manta.jobs.budgets import AtLimit, Per


@click.group(epilog=output.example("manta budget list", "manta budget set ml --usd 500"))
def command() -> None:
    """What teams may spend: at 80 % an event warns, at 100 % new jobs are held."""


@command.command("list", epilog=output.example("manta budget list --json"))
@output.json_option
def list_(as_json: bool) -> None:
    """Show all budgets, and what is spent in the running period."""
    from manta import state as states
    from manta.jobs import budgets

    found = budgets.listed(states.open_state())
    if as_json:
        output.print_json(found)
    elif found:
        rows = [
            (
                each["team"],
                budgets.money(each["usd"]),
                each["per"],
                budgets.money(each["spent_usd"]) + ("+?" if each["is_partial"] else ""),
                f"{100 * each['spent_usd'] / each['usd']:.0f} %",
                each["at_limit"],
                each["state"],
            )
            for each in found
        ]
        columns = ["TEAM", "USD", "PER", "SPENT", "SHARE", "AT LIMIT", "STATE"]
        output.print_table(columns, rows)
    else:
        output.say("no team has a budget; set one with `manta budget set`")


@command.command("set", epilog=output.example("manta budget set ml --usd 500 --per week"))
@click.argument("team")
@click.option("--usd", type=float, required=True, help="What the team may spend in a period.")
@click.option(
    "--per",
    type=click.Choice(["day", "week", "month", "total"]),
    default="month",
    show_default=True,
    help="UTC; a week begins on Monday.",
)
@click.option(
    "--at-limit",
    type=click.Choice(["hold", "stop"]),
    default="hold",
    show_default=True,
    help="Hold new jobs, or stop running ones too.",
)
@output.json_option
def set_(team: str, usd: float, per: str, at_limit: str, as_json: bool) -> None:
    """Set the budget of TEAM; what it has spent in the running period counts."""
    from manta import state as states
    from manta.jobs import budgets, request

    state = states.open_state()
    actor = request.actor()
    budget = budgets.put(state, team, usd, cast("Per", per), cast("AtLimit", at_limit), actor)
    if as_json:
        output.print_json(next(b for b in budgets.listed(state) if b["team"] == team))
    else:
        output.say(f"team {team} has spent {budget.words()}")


@command.command("remove", epilog=output.example("manta budget remove ml"))
@click.argument("team")
@output.json_option
def remove(team: str, as_json: bool) -> None:
    """Forget the budget of TEAM: it may spend what it wants."""
    from manta import state as states
    from manta.jobs import budgets, request

    budgets.remove(states.open_state(), team, request.actor())
    if as_json:
        output.print_json({"team": team})
