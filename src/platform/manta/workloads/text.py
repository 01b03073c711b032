"""Files to documents: list, read, clean, cut, identify. Pure functions over one file or text."""

from __future__ import annotations

import hashlib
import json
import re
import sysconfig
import unicodedata
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from manta import storage
from manta.errors import InputError
from manta.spec import STDLIB, PrepareConfig

Format = Literal["text", "jsonl", "parquet"]

HASH_DIGITS = 32
"""Hexadecimal digits of a document's id: 128 bits, so that two texts never share one."""
ROWS_AT_A_TIME = 1024
NOT_LIBRARY = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
)
GENERATED = frozenset({"encodings", "pydoc_data"})
"""Of the library: tables that a program wrote, a tenth of its bytes and none of its style."""
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufeff]")
TRAILING = re.compile(r"[ \t]+$", re.MULTILINE)


@dataclass(frozen=True)
class InputFile:
    """One file to read."""

    name: str
    """Its URL; of a standard library's file, `python-stdlib/…`, the same on every machine."""
    size_bytes: int
    format: Format

    @property
    def url(self) -> str:
        """Where it lies for the process that asks: a library's place may differ by machine."""
        if self.name.startswith(f"{STDLIB}/"):
            return str(_library() / self.name.removeprefix(f"{STDLIB}/"))
        return self.name


def list_inputs(config: PrepareConfig) -> tuple[InputFile, ...]:
    """The files of `config.inputs`, by name; one named twice is read once.

    Raises:
        InputError: an input matches no file, or the store cannot be listed.
    """
    files: dict[str, int] = {}
    for url in config.inputs:
        found = _library_files() if url == STDLIB else storage.file_sizes(url)
        if not found:
            raise InputError(
                f"inputs: {url} matches no file",
                f"give a file, folder or glob that exists, or `{STDLIB}`",
            )
        files |= found
    return tuple(
        InputFile(name, files[name], _format(name, config.format)) for name in sorted(files)
    )


def _library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _library_files() -> dict[str, int]:
    root = _library()
    paths = (path.relative_to(root) for path in root.rglob("*.py"))
    kept = (path for path in paths if not (NOT_LIBRARY | GENERATED) & set(path.parts))
    return {f"{STDLIB}/{path.as_posix()}": (root / path).stat().st_size for path in kept}


def _format(name: str, wanted: str) -> Format:
    if wanted != "auto":
        return wanted  # type: ignore[return-value]  # the config's type is Format or "auto"
    if name.endswith(".parquet"):
        return "parquet"
    return "jsonl" if re.search(r"\.jsonl(\.\w+)?$", name) else "text"


def read_texts(file: InputFile, text_field: str) -> Iterator[str | None]:
    """The raw texts of one file; None for a text file that is not UTF-8 text.

    Raises:
        InputError: the file cannot be read, or a line or column is not as it should be.
    """
    reader: Callable[..., Iterator[str | None]] = {
        "text": _read_text,
        "jsonl": _read_jsonl,
        "parquet": _read_parquet,
    }[file.format]
    fs, path = storage.filesystem(file.url)
    compression = None if file.format == "parquet" else "infer"
    try:
        with fs.open(path, "rb", compression=compression) as stream:
            yield from reader(stream, file.name, text_field)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{file.name}: cannot be read ({error or 'cut short'})") from None


def _read_text(stream: IO[bytes], _name: str, _field: str) -> Iterator[str | None]:
    data = stream.read()
    try:
        yield None if b"\0" in data else data.decode("utf-8-sig")
    except UnicodeDecodeError:
        yield None


def _read_jsonl(stream: IO[bytes], name: str, field: str) -> Iterator[str]:
    for number, line in enumerate(stream, start=1):
        if line.strip():
            yield _line_text(line, f"{name}:{number}", field)


def _line_text(line: bytes, where: str, field: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise InputError(f"{where}: not JSON", "write one JSON object on each line") from None
    if not isinstance(row, dict):
        raise InputError(f"{where}: not a JSON object", f'write {{"{field}": "…"}}')
    if not isinstance(row.get(field), str):
        keys = ", ".join(map(str, row)) or "none"
        raise InputError(
            f"{where}: no text under `{field}`", f"set text_field to one of its keys: {keys}"
        )
    return str(row[field])


def _read_parquet(stream: IO[bytes], name: str, field: str) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(stream)
        _check_column(file.schema_arrow, name, field)
        for batch in file.iter_batches(ROWS_AT_A_TIME, columns=[field]):
            yield from (text or "" for text in batch.column(0).to_pylist())
    except pa.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{name}: not a readable Parquet file ({reason})") from None


def _check_column(schema: Any, name: str, field: str) -> None:
    import pyarrow.types as types

    if field not in schema.names:
        columns = ", ".join(schema.names) or "none"
        raise InputError(
            f"{name}: no column `{field}`", f"set text_field to one of its columns: {columns}"
        )
    kind = schema.field(field).type
    if not (types.is_string(kind) or types.is_large_string(kind)):
        raise InputError(f"{name}: column `{field}` holds {kind}, not text", "set text_field")


def clean(text: str) -> str:
    """`text` in Unicode NFC with `\\n` line ends, without control characters, trailing blanks
    and blank lines around it."""
    text = CONTROL.sub("", text)  # first: what it parted may join in the next steps
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = unicodedata.normalize("NFC", _whole_characters(text))
    return TRAILING.sub("", text).strip("\n")


def _whole_characters(text: str) -> str:
    """`text` with halves of surrogate pairs (JSON's `\\ud800`), which UTF-8 has not, replaced."""
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def cut(text: str, max_chars: int) -> Iterator[str]:
    """`text` in pieces of at most `max_chars`; nothing is lost."""
    for start in range(0, max(len(text), 1), max_chars):
        yield text[start : start + max_chars]


def document_id(text: str) -> str:
    """Hash of a document's text, as HASH_DIGITS hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()[:HASH_DIGITS]


def shard_of(document: str, num_shards: int) -> int:
    """The shard of a document id. Shards are ranges of ids: their order is the ids' order."""
    return int(document[:8], 16) * num_shards >> 32


def is_validation(document: str, fraction: float) -> bool:
    """Whether a document id is held out; other bits of the hash than the shard's decide."""
    return int(document[8:16], 16) < fraction * 2**32
