"""`manta access`: keys of the queue's HTTP API."""

from __future__ import annotations

import click

from manta.cli import output
from manta.cli.jobs import when

ROLE = click.Choice(["viewer", "submitter", "admin"])


@click.group(
    invoke_without_command=True,
    epilog=output.example("manta access", "manta access add nightly --role submitter"),
)
@output.json_option
@click.pass_context
def command(context: click.Context, as_json: bool) -> None:
    """List the keys of the HTTP API that `manta queue --http` serves; secrets are not kept."""
    if context.invoked_subcommand is not None:
        return
    from manta import state as states
    from manta.jobs import access

    rows = [
        (k.name, k.role.name.lower(), k.created_at) for k in access.listed(states.open_state())
    ]
    if as_json:
        fields = ("name", "role", "created_at")
        output.print_json([dict(zip(fields, row, strict=True)) for row in rows])
    elif rows:
        shown = [(name, role, when(at)) for name, role, at in rows]
        output.print_table(["KEY", "ROLE", "SINCE (UTC)"], shown)
    else:
        output.say("no keys yet; make one with `manta access add`")


@command.command("add", epilog=output.example("manta access add nightly --role submitter"))
@click.argument("name")
@click.option("--role", type=ROLE, required=True, help="What it may do.")
@output.json_option
def add(name: str, role: str, as_json: bool) -> None:
    """Make a key and print its secret, this once. Jobs that it submits are NAME's."""
    from manta import state as states
    from manta.jobs import access, request

    kind = access.Role[role.upper()]
    secret = access.add(states.open_state(), name, kind, request.actor())
    if as_json:
        output.print_json({"name": name, "role": role, "key": secret})
    else:
        click.echo(secret)


@command.command("remove", epilog=output.example("manta access remove nightly"))
@click.argument("name")
@output.json_option
def remove(name: str, as_json: bool) -> None:
    """Withdraw a key: the next request with it is refused."""
    from manta import state as states
    from manta.jobs import access, request

    access.remove(states.open_state(), name, request.actor())
    if as_json:
        output.print_json({"name": name})
    else:
        output.say(f"key {name} is withdrawn")
