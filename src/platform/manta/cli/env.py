"""`manta env`: the variables under which plain ray and serve commands reach a cluster."""

from __future__ import annotations

import shlex

import click

from manta.cli import output


@click.command(epilog=output.example('eval "$(manta env)"', "ray job list", "serve status"))
@output.cluster_option
@output.json_option
def command(cluster: str, as_json: bool) -> None:
    """Print the variables under which plain ray and serve commands reach a cluster.

    The token itself is not among them, only the path of its file.
    """
    from manta.cluster import record

    variables = record.find(cluster).client_environment()
    if as_json:
        output.print_json(variables)
        return
    # A token in the shell's environment outranks the file and would be another cluster's.
    click.echo("unset RAY_AUTH_TOKEN")
    for name, value in variables.items():
        click.echo(f"export {name}={shlex.quote(value)}")
