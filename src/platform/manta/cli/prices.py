"""`manta prices refresh`: today's list prices as a file for `manta plan --prices`."""

from __future__ import annotations

import datetime
from pathlib import Path

import click

from manta.cli.output import example, progress, say


@click.group()
def command() -> None:
    """Prices that plans use."""


@command.command(
    epilog=example("manta prices refresh --cloud aws --region us-west-2 --out aws-today.yaml")
)
@click.option("--cloud", type=click.Choice(["aws", "azure"]), required=True)
@click.option("--region", required=True, help="As the cloud writes it: us-west-2, eastus.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True)
def refresh(cloud: str, region: str, out: Path) -> None:
    """Fetch the list prices of the machines in the catalogue and write a price file."""
    from manta.cluster.price_lists import refreshed_file
    from manta.spec.catalog import load_catalog

    names = load_catalog().names(cloud)
    with progress(f"Reading {cloud}'s price list of {region}"):
        text = refreshed_file(cloud, region, names, datetime.date.today())
    out.write_text(text, encoding="utf-8")
    say(f"Wrote {out}. Use it: manta plan … --prices {out}")
