"""`manta quota`: what teams and users are due, and may hold at most."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import click

from manta.cli import output
from manta.errors import InputError

if TYPE_CHECKING:
    from manta.jobs.shares import Kind

KIND = click.Choice(["team", "user"])


@click.group(
    invoke_without_command=True,
    epilog=output.example("manta quota", "manta quota set team ml --weight 2 --limit GPU=8"),
)
@output.json_option
@click.pass_context
def command(context: click.Context, as_json: bool) -> None:
    """Show weights and limits; who has none has weight 1 and no limit."""
    if context.invoked_subcommand is not None:
        return
    from dataclasses import asdict

    from manta import state as states
    from manta.jobs import shares

    found = shares.load(states.open_state())
    rows = [("team", n, s) for n, s in found.teams.items()]
    rows += [("user", n, s) for n, s in found.users.items()]
    if as_json:
        output.print_json([{"kind": kind, "name": name, **asdict(s)} for kind, name, s in rows])
    elif rows:
        shown = [(k, n, f"{s.weight:g}", shares.show(s.limits) or "-") for k, n, s in rows]
        output.print_table(["", "NAME", "WEIGHT", "LIMITS"], shown)
    else:
        output.say("nothing is set: everybody has weight 1 and no limit")


@command.command(
    "set", epilog=output.example("manta quota set team ml --weight 2 --limit GPU=8 --limit jobs=4")
)
@click.argument("kind", type=KIND)
@click.argument("name")
@click.option("--weight", type=float, default=1.0, show_default=True, help="Share for its size.")
@click.option(
    "--limit", "limits", multiple=True, metavar="RESOURCE=N", help="Most at once; `jobs` too."
)
@output.json_option
def set_(kind: str, name: str, weight: float, limits: tuple[str, ...], as_json: bool) -> None:
    """Set the share of a team or user; what is not given goes back to its default."""
    from manta import state as states
    from manta.jobs import request, shares
    from manta.jobs.books import Share

    share = Share(weight=weight, limits=dict(map(_limit, limits)))
    shares.put(states.open_state(), cast("Kind", kind), name, share, request.actor())
    if as_json:
        output.print_json({"kind": kind, "name": name, "weight": weight, "limits": share.limits})


@command.command("remove", epilog=output.example("manta quota remove team ml"))
@click.argument("kind", type=KIND)
@click.argument("name")
@output.json_option
def remove(kind: str, name: str, as_json: bool) -> None:
    """Forget the share of a team or user; it has weight 1 and no limit then."""
    from manta import state as states
    from manta.jobs import request, shares

    shares.remove(states.open_state(), cast("Kind", kind), name, request.actor())
    if as_json:
        output.print_json({"kind": kind, "name": name})


def _limit(text: str) -> tuple[str, float]:
    from manta.jobs.books import SLOT

    name, _, amount = text.partition("=")
    try:
        return (SLOT if name == "jobs" else name), float(amount)
    except ValueError:
        raise InputError(f"--limit {text}: not RESOURCE=NUMBER", "e.g. GPU=8") from None
