"""Prompts for batch inference: JSONL or Parquet files, read whole and cut into shards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from manta import storage
from manta.errors import InputError

Row = dict[str, Any]


@dataclass(frozen=True)
class Prompts:
    """All input rows in order; `places` says where each stands, for messages."""

    rows: tuple[Row, ...]
    places: tuple[str, ...]
    is_chat: bool
    """Prompts are lists of chat messages, not plain text."""


@dataclass(frozen=True)
class Shard:
    """Rows that are written together. The name follows from position and content."""

    name: str
    start: int
    """Position of its first row among all rows."""
    rows: tuple[Row, ...]


def read_prompts(url: str, field: str) -> Prompts:
    """Read every row of the files that `url` names; `field` holds the prompt.

    Raises:
        InputError: no file, a line that is not a JSON object, a prompt that is missing or empty.
    """
    files = storage.glob(url)
    if not files:
        raise InputError(f"{url}: no such file", "give a JSONL or Parquet file, folder or glob")
    rows: list[Row] = []
    places: list[str] = []
    for file in files:
        for place, row in _rows(file):
            _check_prompt(row, field, place)
            rows.append(row)
            places.append(place)
    if not rows:
        raise InputError(f"{url}: holds no prompts", "write one JSON object a line")
    kinds = [isinstance(row[field], list) for row in rows]
    if any(kinds) and not all(kinds):
        raise InputError(
            f"{places[kinds.index(not kinds[0])]}: plain text and chat messages are mixed",
            "keep them in separate files",
        )
    return Prompts(tuple(rows), tuple(places), is_chat=kinds[0])


def cut(rows: Sequence[Row], rows_per_shard: int) -> list[Shard]:
    """Shards of consecutive rows."""
    shards = []
    for number, start in enumerate(range(0, len(rows), rows_per_shard)):
        part = tuple(rows[start : start + rows_per_shard])
        shards.append(Shard(f"shard-{number:05d}-{digest(part)[:12]}.parquet", start, part))
    return shards


def digest(value: Any) -> str:
    """SHA-256 of a value's canonical JSON, as hex; other types enter as their text."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _rows(file: str) -> Iterator[tuple[str, Row]]:
    if file.endswith(".parquet"):
        yield from _parquet_rows(file)
        return
    for number, line in enumerate(storage.read_bytes(file).split(b"\n"), 1):
        if line.strip():
            yield f"{file}:{number}", _json_row(line, f"{file}:{number}")


def _json_row(line: bytes, place: str) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        raise InputError(
            f"{place}: not JSON", 'write one object a line: {"prompt": "…"}'
        ) from None
    if not isinstance(row, dict):
        raise InputError(f"{place}: not a JSON object", 'write e.g. {"prompt": "…"}')
    return row


def _parquet_rows(file: str) -> Iterator[tuple[str, Row]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    fs, path = storage.filesystem(file)
    try:
        with fs.open(path, "rb") as source:
            table = pq.read_table(source)
    except (OSError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{file}: not a readable Parquet file ({reason})") from None
    for number, row in enumerate(table.to_pylist()):
        yield f"{file} row {number}", row


def _check_prompt(row: Row, field: str, place: str) -> None:
    if field not in row:
        raise InputError(
            f"{place}: no field `{field}`",
            f"set prompt_field to one of: {', '.join(map(str, row))}" if row else "add it",
        )
    prompt = row[field]
    if not prompt:
        raise InputError(f"{place}: `{field}` is empty", "remove the row, or write a prompt")
    if isinstance(prompt, str):
        return
    if not isinstance(prompt, list) or not all(
        isinstance(message, dict) and {"role", "content"} <= set(message) for message in prompt
    ):
        raise InputError(
            f"{place}: `{field}` is neither text nor chat messages",
            'write a string, or [{"role": "user", "content": "…"}]',
        )
