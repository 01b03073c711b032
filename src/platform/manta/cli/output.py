"""What all commands share: common options, and printing for people or for programs.

Results go to stdout (`--json`: one JSON document), progress and remarks to stderr. Tables and
spinners appear on a terminal only; elsewhere the same words come as plain lines.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click

from manta.cluster.record import DEFAULT_NAME, ClusterRecord

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")

dry_run_option = click.option(
    "--dry-run", is_flag=True, help="Print the plain command that this stands for; do nothing."
)

cluster_option = click.option(
    "--name",
    "--cluster",
    "cluster",
    metavar="NAME",
    default=DEFAULT_NAME,
    show_default=True,
    help="Which cluster.",
)


def example(*lines: str) -> str:
    """An epilog for `click.command(epilog=…)` that shows command lines as they are typed."""
    return "\b\nExample:\n" + "\n".join(f"  {line}" for line in lines)


def print_json(value: Any) -> None:
    """Print one JSON document on stdout."""
    click.echo(json.dumps(value, indent=2))


def say(text: str) -> None:
    """Print a remark for people, on stderr."""
    click.echo(text, err=True)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print rows on stdout: a table on a terminal, else columns padded with spaces."""
    cells = [[str(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        _print_rich_table(columns, cells)
        return
    for line in _padded(columns, cells):
        click.echo(line)


def say_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print rows on stderr, for people."""
    for line in _padded(columns, [[str(cell) for cell in row] for row in rows]):
        say(line)


def print_cluster(record: ClusterRecord) -> None:
    """Say where everything of a cluster is that has just come up."""
    click.echo(f"Cluster `{record.name}` is up.")
    click.echo(f"  dashboard  {record.dashboard_url}  (token: the content of {record.token_path})")
    click.echo(f"  endpoints  {record.serve_url}")
    click.echo(f"  storage    {record.storage_url}")
    flag = "" if record.name == DEFAULT_NAME else f" --name {record.name}"
    click.echo(f'  plain ray and serve commands: eval "$(manta env{flag})"')


def _padded(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    for row in [columns, *cells]:
        padded = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield "  ".join(padded).rstrip()


def _print_rich_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")  # a path that is cut cannot be copied
    for row in rows:
        table.add_row(*map(escape, row))
    Console().print(table)


@contextmanager
def progress(text: str) -> Iterator[Callable[[str], None]]:
    """Show that work goes on during the block: a spinner on a terminal, else lines, on stderr.

    Yields a function that changes the text.
    """
    if not sys.stderr.isatty():
        say(f"{text} …")
        yield lambda changed: say(f"{changed} …")
        return
    from rich.console import Console

    with Console(stderr=True).status(f"{text} …") as status:
        yield lambda changed: status.update(f"{changed} …")
