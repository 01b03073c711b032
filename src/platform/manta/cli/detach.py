"""`manta detach`: forget a cluster that others started."""

from __future__ import annotations

import click

from manta.cli import output, watch


@click.command(epilog=output.example("manta detach gpu"))
@click.argument("name")
@output.json_option
def command(name: str, as_json: bool) -> None:
    """Forget cluster NAME, which was attached. It goes on; what ran there stays in history."""
    from manta.cluster import attach

    attach.detach(name)
    watch.note("cluster detached", name, name)
    if as_json:
        output.print_json({"cluster": name, "attached": False})
    else:
        output.say(f"cluster `{name}` is forgotten")
