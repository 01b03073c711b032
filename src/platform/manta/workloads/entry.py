"""What every script in `jobs/` does around its work: read the config, report, fail in one line."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from typing import TypeVar

from manta import spec, storage
from manta.errors import MantaError

Config = TypeVar("Config", bound=spec.Spec)
_metrics: dict[str, float] = {}


def run(
    model: type[Config], work: Callable[[Config], dict[str, str]], description: str | None
) -> None:
    """Parse `--config FILE --set KEY=VALUE`, do `work(config)`, and report its artifacts.

    `work` returns artifact name → URL. Exits with 2 for bad input and 1 for work that failed,
    each with one line on stderr.
    """
    started = time.monotonic()
    try:
        artifacts = work(_config(model, description))
        _report(artifacts, time.monotonic() - started)
    except MantaError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)


def measured(**metrics: float) -> None:
    """Values that this job found; they are kept with it."""
    _metrics.update(metrics)


def progress(text: str) -> None:
    """Say what is happening now; appears in `ray job logs` at once."""
    print(text, flush=True)


def _config(model: type[Config], description: str | None) -> Config:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML config of this job")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="set one value over the file, e.g. --set num_steps=20; may be repeated",
    )
    args = parser.parse_args()
    return spec.load(args.config, model, args.set)


def _report(artifacts: dict[str, str], duration_s: float) -> None:
    for name, url in artifacts.items():
        progress(f"{name}: {url}")
    progress(f"done in {duration_s:.1f} s")
    if report := os.environ.get("MANTA_REPORT"):
        storage.write_json(report, {"artifacts": artifacts, "metrics": _metrics})
