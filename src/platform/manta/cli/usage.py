"""`manta usage`: what teams, users and jobs have held and cost; with what was idle, the bill."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import click

from manta.cli import output

if TYPE_CHECKING:
    from manta.jobs.costs import Cost
    from manta.jobs.usage import By, Usage

COSTS = ("node_seconds", "gpu_hours", "usd", "kwh", "kgco2e")
HEADINGS = ("NODE-SECONDS", "GPU-HOURS", "USD", "KWH", "KGCO2E")


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
    """Show what was asked for, times how long it ran, and what that cost of the nodes there were.

    A job pays its share of the cluster, by the resource of which it asked for the largest part;
    what no job held is idle. The total is what the clusters cost by their price lists. `?` is what
    no price list or power figure tells; `3.20+?` leaves such a part out.
    """
    from dataclasses import asdict

    from manta import state as states
    from manta.jobs import spending, usage
    from manta.jobs.costs import IDLE

    state, since = states.open_state(), states.now() - days * 86400
    found = usage.report(state, cast("By", by), since)
    if as_json:
        summary = spending.summary(state, cast("By", by), since)
        held = {owner: asdict(usage) for owner, usage in found.items()}
        output.print_json(summary | {"held": held})
        return
    parts = spending.report(state, cast("By", by), since)
    if not found and not parts[IDLE].node_s:
        output.say(f"no job has run in the last {days:g} days")
        return
    _print(by, found, parts)
    _remark(spending.total(parts), since)


def shown(cost: Cost, name: str) -> str:
    """One sum for people: `?` if nothing is known of it, `3.20+?` if not all is."""
    amount = cost.amounts()[name]
    if amount is None:
        return "?"
    number = f"{amount:.0f}" if name == "node_seconds" else f"{amount:.2f}"
    if 0 < amount < 1:
        number = f"{amount:.3g}"
    return f"{number}+?" if name in cost.partial() else number


def _print(by: str, found: dict[str, Usage], parts: dict[str, Cost]) -> None:
    from manta.jobs import spending
    from manta.jobs.costs import IDLE, Cost

    kinds = sorted({kind for held in found.values() for kind in held.resource_hours} - {"GPU"})
    names = list(dict.fromkeys([*spending.jobs_only(parts), *found]))
    rows = [_row(name, found.get(name), parts.get(name, Cost()), kinds) for name in names]
    rows.append(_row("(idle)", None, parts[IDLE], kinds))
    rows.append(_row("(total)", None, spending.total(parts), kinds))
    columns = [by.upper(), "ATTEMPTS", "HOURS", "FAILED", *(f"{k}-HOURS" for k in kinds)]
    output.print_table([*columns, *HEADINGS], rows)


def _row(name: str, held: Usage | None, cost: Cost, kinds: list[str]) -> tuple[object, ...]:
    costs = (shown(cost, column) for column in COSTS)
    if held is None:
        return (name, *("-" * (3 + len(kinds))), *costs)
    hours = (f"{held.resource_hours.get(kind, 0.0):.2f}" for kind in kinds)
    return (
        name,
        held.num_attempts,
        f"{held.hours:.2f}",
        f"{held.failed_hours:.2f}",
        *hours,
        *costs,
    )


def _remark(total: Cost, since: float) -> None:
    from manta import state as states
    from manta.jobs import metering

    if total.without_price_s:
        output.say(f"no price is known for {total.without_price_s:.0f} node-seconds")
    if unseen_s := metering.unseen_s(states.open_state(), since):
        output.say(
            f"nodes ended unseen up to {unseen_s:.0f} node-seconds after they were last seen"
        )
