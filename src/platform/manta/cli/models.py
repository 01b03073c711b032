"""`manta models`: numbered versions of models, and which of them `NAME@ALIAS` means."""

from __future__ import annotations

import getpass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from manta import storage
from manta.cli import output

if TYPE_CHECKING:
    from manta.serving.registry import Version


@click.group(
    epilog=output.example(
        "manta models add quickstart --as production",
        "manta models list quickstart",
        "manta models promote quickstart@1 production",
    )
)
def command() -> None:
    """Register models, list them, and say which version is which.

    A Serve config names one as `model_source: NAME@VERSION` or `NAME@ALIAS`. They lie in
    the storage (`$MANTA_STORAGE`), and stay when a training replaces what they were made from.
    """


@command.command("add", epilog=output.example("manta models add quickstart --as staging"))
@click.argument("name")
@click.option("--from", "source", metavar="URL", help="A sealed folder.  [the trained model NAME]")
@click.option("--as", "alias", metavar="ALIAS", help="Also promote it.")
@output.json_option
def add(name: str, source: str | None, alias: str | None, as_json: bool) -> None:
    """Copy a model into the registry, as the next version of NAME."""
    from manta.serving import registry
    from manta.workloads import layout

    root, by = storage.root(), getpass.getuser()
    made = registry.add(root, name, source or layout.model(name, root), by)
    if alias:
        made = registry.promote(root, made.reference, alias, by)
    _print([made], as_json)


@command.command("promote", epilog=output.example("manta models promote quickstart@3 production"))
@click.argument("reference", metavar="NAME@VERSION")
@click.argument("alias")
@output.json_option
def promote(reference: str, alias: str, as_json: bool) -> None:
    """Have NAME@ALIAS mean this version, from the next deploy on."""
    from manta.serving import registry

    made = registry.promote(storage.root(), reference, alias, getpass.getuser())
    _print([made], as_json)


@command.command("list", epilog=output.example("manta models list --json"))
@click.argument("name", required=False)
@output.json_option
def list_(name: str | None, as_json: bool) -> None:
    """List versions, of all models or of NAME."""
    from manta.serving import registry

    root = storage.root()
    wanted = [name] if name else registry.names(root)
    found = [version for one in wanted for version in registry.versions(root, one)]
    if not found and not as_json:
        output.say("no versions; make one with `manta models add NAME`")
    else:
        _print(found, as_json)


def _print(found: list[Version], as_json: bool) -> None:
    if as_json:
        output.print_json([_facts(one) for one in found])
    else:
        columns = ["MODEL", "ALIASES", "CONTENT", "BY", "AT"]
        output.print_table(columns, [_row(one) for one in found])


def _facts(one: Version) -> dict[str, Any]:
    return {
        "model": one.reference,
        "aliases": list(one.aliases),
        "content": one.content,
        "by": one.by,
        "at": one.at,
    }


def _row(one: Version) -> list[object]:
    at = datetime.fromtimestamp(one.at, UTC).strftime("%Y-%m-%d %H:%M")
    return [one.reference, ", ".join(one.aliases) or "-", one.content, one.by, at]
