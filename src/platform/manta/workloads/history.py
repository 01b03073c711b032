"""What a run measured: records by step, kept as metrics.jsonl, drawn as a curve."""

from __future__ import annotations

import io
import json
from typing import Any

from manta import storage
from manta.errors import InputError

Record = dict[str, float]
FILE = "metrics.jsonl"


def load(run_url: str, up_to_step: int) -> list[Record]:
    """Records of a run up to a step; what was measured after it is computed again."""
    url = storage.join(run_url, FILE)
    if not storage.exists(url):
        return []
    lines = storage.read_bytes(url).decode().splitlines()
    try:
        records = [json.loads(line) for line in lines]
    except ValueError:
        raise InputError(f"{url}: not JSON lines", "delete it; only the curve is lost") from None
    return [record for record in records if record["step"] <= up_to_step]


def save(run_url: str, records: list[Record]) -> None:
    """Write all records; whole or not at all."""
    lines = "".join(json.dumps(record) + "\n" for record in records)
    storage.write_bytes(storage.join(run_url, FILE), lines.encode())


def latest(records: list[Record]) -> Record:
    """The newest value of every metric."""
    return {key: value for record in records for key, value in record.items()}


def draw(url: str, records: list[Record], title: str) -> None:
    """Write a PNG of training and validation loss over steps."""
    figure, axes = _canvas()
    for key, style in (("loss", "-"), ("validation_loss", "o-")):
        points = [(record["step"], record[key]) for record in records if key in record]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=key.replace("_", " "), ms=4)
    axes.set(xlabel="step", ylabel="loss (nats a token)", title=title)
    axes.legend()
    axes.grid(alpha=0.3)
    write_png(url, figure)


def write_png(url: str, figure: Any) -> None:
    """Write a matplotlib figure as PNG."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=120, bbox_inches="tight")
    storage.write_bytes(url, data.getvalue())


def _canvas() -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # the object interface needs no display

    figure = Figure(figsize=(7, 4.2))
    return figure, figure.subplots()
