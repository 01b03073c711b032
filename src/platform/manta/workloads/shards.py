"""The steps of `prepare` that run on the cluster: what each task does, and its Ray Data pipeline.

Tasks write whole files under names that follow from the shard, so one that runs twice, after a
node died, writes the same again.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data

from manta import storage
from manta.spec import PrepareConfig
from manta.workloads import packing, session, text, tokenizer
from manta.workloads.text import InputFile

if TYPE_CHECKING:
    from numpy.typing import NDArray

Fingerprint = dict[str, Any]
"""`sha256` and `size_bytes` of a file, as a seal holds them."""

TASK_BYTES = 32 * 2**20
TASK_FILES = 1024
BATCH_BYTES = 8 * 2**20
SMALL_SHUFFLE_SHARDS = 64

DOCUMENT, TOO_SHORT, NOT_TEXT = 0, 1, 2
ROWS = pa.schema(
    {"shard": pa.int32(), "kind": pa.int8(), "id": pa.string(), "text": pa.large_string()}
)
"""What is read: documents, and what was dropped, to be counted (as text, the name of a file that
is no text)."""


COLLECTED = pa.schema(
    {
        "index": pa.int32(),
        "num_read": pa.int64(),
        "num_documents": pa.int64(),
        "num_too_short": pa.int64(),
        "num_duplicates": pa.int64(),
        "not_text": pa.list_(pa.string()),
    }
)


@dataclass(frozen=True)
class Place:
    """Where the parts of a dataset lie."""

    url: str

    @property
    def tokenizer(self) -> str:
        """Folder of the tokenizer."""
        return storage.join(self.url, "tokenizer")

    @property
    def work(self) -> str:
        """Folder of what only the making needs."""
        return storage.join(self.url, "work")

    def documents(self, shard: int) -> str:
        """File of a shard's documents: id, text; sorted by id."""
        return storage.join(self.work, f"{shard:05d}.parquet")


@dataclass(frozen=True, kw_only=True)
class Collected:
    """What one shard received."""

    index: int
    num_read: int
    num_documents: int
    num_too_short: int
    num_duplicates: int
    not_text: tuple[str, ...]
    """Names of files that hold no UTF-8 text."""


@dataclass(frozen=True, kw_only=True)
class Packed:
    """What all shards were packed into."""

    splits: dict[str, dict[str, int]]
    """Split → documents, bytes (of text), tokens (in blocks), tokens_left_over, blocks."""
    token_counts: list[int]
    """Token id → occurrences in the training blocks."""
    files: dict[str, Fingerprint]
    """Name in the dataset → content."""

    @property
    def num_documents(self) -> int:
        """Documents in all splits."""
        return sum(counts["documents"] for counts in self.splits.values())


def fingerprints(names: Sequence[str], sizes: Mapping[str, int]) -> dict[str, Fingerprint]:
    """Size and SHA-256 of each file, read on the cluster, by name."""
    groups = [{"names": group} for group in _groups(names, sizes)]
    found = ray.data.from_items(groups, override_num_blocks=len(groups)).flat_map(_fingerprint)
    rows = session.rows(found, "files read", len(names))
    contents = {row.pop("name"): row for row in rows}
    return {name: contents[name] for name in names}


def _groups(names: Sequence[str], sizes: Mapping[str, int]) -> list[list[str]]:
    """The names in order, in groups for one task each."""
    groups: list[list[str]] = [[]]
    num_bytes = 0
    for name in names:
        if groups[-1] and (num_bytes + sizes[name] > TASK_BYTES or len(groups[-1]) >= TASK_FILES):
            groups.append([])
            num_bytes = 0
        groups[-1].append(name)
        num_bytes += sizes[name]
    return groups


def _fingerprint(row: dict[str, Any]) -> list[dict[str, Any]]:
    urls = {name: InputFile(name, 0, "text").url for name in row["names"]}
    return [{"name": name, **storage.fingerprint_file(url)} for name, url in urls.items()]


def collect(
    files: Sequence[InputFile], config: PrepareConfig, num_shards: int, place: Place
) -> list[Collected]:
    """Read all files into `place.documents`, one file a shard, each text once.

    Raises InputError for a file that is not as it should be.
    """
    by_name = {file.name: file for file in files}
    groups = _groups(list(by_name), {file.name: file.size_bytes for file in files})
    items = [{"files": [asdict(by_name[name]) for name in group]} for group in groups]

    def read(batch: dict[str, Any]) -> Iterator[pa.Table]:
        group = [InputFile(**file) for files in batch["files"] for file in files]
        return _read(group, config, num_shards)

    def write(rows: pa.Table) -> pa.Table:
        return pa.Table.from_pylist([asdict(_write_documents(rows, place))], COLLECTED)

    _choose_shuffle(num_shards)
    read_rows = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        read, batch_size=1
    )
    by_shard = read_rows.groupby("shard", num_partitions=num_shards)
    shards = by_shard.map_groups(write, batch_format="pyarrow")
    collected = [Collected(**row) for row in session.rows(shards, "shards", num_shards)]
    return sorted(collected, key=lambda shard: shard.index)


def _choose_shuffle(num_shards: int) -> None:
    """Ray's default shuffle starts two more kinds of worker processes, seconds each, which pays
    only when there is much to move."""
    if num_shards <= SMALL_SHUFFLE_SHARDS:
        context = ray.data.DataContext.get_current()
        context.shuffle_strategy = ray.data.context.ShuffleStrategy.SORT_SHUFFLE_PULL_BASED


def _read(
    files: Sequence[InputFile], config: PrepareConfig, num_shards: int
) -> Iterator[pa.Table]:
    rows: list[dict[str, Any]] = []
    num_bytes = 0
    for file in files:
        for raw in text.read_texts(file, config.text_field):
            for kind, key, kept in _pieces(file, raw, config):
                shard = text.shard_of(key, num_shards)
                rows.append({"shard": shard, "kind": kind, "id": key, "text": kept})
                num_bytes += len(kept)
            if num_bytes >= BATCH_BYTES:
                yield pa.Table.from_pylist(rows, ROWS)
                rows, num_bytes = [], 0
    if rows:
        yield pa.Table.from_pylist(rows, ROWS)


def _pieces(
    file: InputFile, raw: str | None, config: PrepareConfig
) -> Iterator[tuple[int, str, str]]:
    """Kind, id and text of each piece of a raw text; of a dropped one, what to report."""
    if raw is None:
        yield NOT_TEXT, text.document_id(file.name), file.name
        return
    for piece in text.cut(text.clean(raw), config.max_document_chars):
        if len(piece) < config.min_document_chars:
            yield TOO_SHORT, text.document_id(piece), ""
        else:
            yield DOCUMENT, text.document_id(piece), piece


def _write_documents(rows: pa.Table, place: Place) -> Collected:
    """Write one shard's documents, each once; rows come in any order."""
    shard, kinds = rows.column("shard")[0].as_py(), Counter(rows.column("kind").to_pylist())
    documents = packing.unique(_of_kind(rows, DOCUMENT).select(["id", "text"]))
    if len(documents):
        storage.write_bytes(place.documents(shard), packing.parquet_bytes(documents))
    return Collected(
        index=shard,
        num_read=len(rows) - kinds[NOT_TEXT],
        num_documents=len(documents),
        num_too_short=kinds[TOO_SHORT],
        num_duplicates=kinds[DOCUMENT] - len(documents),
        not_text=tuple(sorted(_of_kind(rows, NOT_TEXT).column("text").to_pylist())),
    )


def _of_kind(rows: pa.Table, kind: int) -> pa.Table:
    return rows.filter(pc.equal(rows.column("kind"), kind))


def train_tokenizer(kept: Mapping[int, int], config: PrepareConfig, place: Place) -> None:
    """Train on the first training documents by hash, and write the folder.

    Raises InputError if there is none, or too little for the vocabulary.
    """

    def train() -> None:
        texts = tokenizer.first_bytes(
            _training_texts(kept, config, place), config.tokenizer.train_max_bytes
        )
        tokenizer.write_folder(tokenizer.train(texts, config.tokenizer), place.tokenizer)

    with session.plain_errors():
        ray.get(ray.remote(train).remote())


def _training_texts(kept: Mapping[int, int], config: PrepareConfig, place: Place) -> Iterator[str]:
    for shard, keep in kept.items():
        for key, document in _documents(shard, keep, place):
            if not text.is_validation(key, config.validation_fraction):
                yield document


def _documents(shard: int, keep: int, place: Place) -> Iterator[tuple[str, str]]:
    """Id and text of a shard's first `keep` documents."""
    table = packing.read_parquet(storage.read_bytes(place.documents(shard))).slice(0, keep)
    for batch in table.to_batches(max_chunksize=packing.ROW_GROUP_ROWS):
        yield from zip(
            batch.column("id").to_pylist(), batch.column("text").to_pylist(), strict=True
        )


def pack(kept: Mapping[int, int], config: PrepareConfig, place: Place, vocab_size: int) -> Packed:
    """Tokenize and pack the first `kept[shard]` documents of each shard, and write them."""
    threads = max(1, int(ray.cluster_resources().get("CPU", 1)) // len(kept))

    def work(row: dict[str, Any]) -> dict[str, Any]:
        os.environ.setdefault("RAYON_NUM_THREADS", str(threads))
        return _pack_shard(row["shard"], row["keep"], config, place, vocab_size)

    items = [{"shard": shard, "keep": keep} for shard, keep in kept.items()]
    packed = ray.data.from_items(items, override_num_blocks=len(items)).map(work)
    return _total(session.rows(packed, "shards packed", len(items)), vocab_size)


def _pack_shard(
    shard: int, keep: int, config: PrepareConfig, place: Place, vocab_size: int
) -> dict[str, Any]:
    splits: dict[str, list[tuple[str, str]]] = {"train": [], "validation": []}
    for key, document in _documents(shard, keep, place):
        held_out = text.is_validation(key, config.validation_fraction)
        splits["validation" if held_out else "train"].append((key, document))
    token_counts = np.zeros(vocab_size, np.int64)
    row: dict[str, Any] = {"files": []}
    for split, documents in splits.items():
        rate = config.tokenizer.loose_space_rate if split == "train" else 0.0
        texts = [document for _, document in documents]
        blocks, row[split] = _blocks(texts, rate, config.sequence_length, place)
        if len(blocks):
            _write(row["files"], place, f"{split}/{shard:05d}", packing.blocks_table(blocks))
        if split == "train":
            token_counts = np.bincount(blocks.reshape(-1), minlength=vocab_size)
    if splits["validation"]:
        name = f"validation_text/{shard:05d}"
        _write(row["files"], place, name, packing.documents_table(splits["validation"]))
    return {**row, "token_counts": token_counts}


def _blocks(
    documents: Sequence[str], loose_space_rate: float, sequence_length: int, place: Place
) -> tuple[NDArray[np.int32], dict[str, int]]:
    """The documents' blocks, and what there is to count."""
    trained, end_of_text = tokenizer.load(place.tokenizer)
    table = packing.spaces(trained)
    tokens = [
        packing.loosen(ids, table, loose_space_rate)
        for ids in packing.encode(documents, trained, end_of_text)
    ]
    blocks = packing.pack(tokens, sequence_length)
    return blocks, {
        "documents": len(documents),
        "bytes": sum(len(document.encode()) for document in documents),
        "tokens": blocks.size,
        "tokens_left_over": sum(map(len, tokens)) - blocks.size,
        "blocks": len(blocks),
    }


def _write(files: list[Fingerprint], place: Place, name: str, table: pa.Table) -> None:
    data = packing.parquet_bytes(table)
    storage.write_bytes(storage.join(place.url, f"{name}.parquet"), data)
    files.append({"name": f"{name}.parquet", **storage.fingerprint(data)})


def _total(rows: Iterable[dict[str, Any]], vocab_size: int) -> Packed:
    splits: dict[str, Counter[str]] = {"train": Counter(), "validation": Counter()}
    token_counts = np.zeros(vocab_size, np.int64)
    files: dict[str, Fingerprint] = {}
    for row in rows:  # as they come: a row holds a count for each token of the vocabulary
        for split, counts in splits.items():
            counts.update(row[split])
        token_counts += row["token_counts"]
        files |= {file.pop("name"): file for file in row["files"]}
    return Packed(
        splits={split: dict(counts) for split, counts in splits.items()},
        token_counts=token_counts.tolist(),
        files={name: files[name] for name in sorted(files)},
    )
