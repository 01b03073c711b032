"""Documents of one shard to token blocks and Parquet bytes; the same in, the same bytes out."""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from tokenizers import Tokenizer

ENCODE_BATCH_BYTES = 2**20
ROW_GROUP_ROWS = 1024
"""Readers shuffle and share out row groups, so one holds about a thousand rows."""


def unique(documents: pa.Table) -> pa.Table:
    """The rows in order of `id`, the first of each id."""
    ordered = documents.sort_by("id").combine_chunks()
    if len(ordered) < 2:
        return ordered
    ids = ordered.column("id")
    is_new = pc.not_equal(ids.slice(1), ids.slice(0, len(ids) - 1))
    return ordered.filter(pa.chunked_array([pa.array([True]), *is_new.chunks]))


def encode(
    texts: Iterable[str], tokenizer: Tokenizer, end_of_text: int
) -> Iterator[NDArray[np.int32]]:
    """Token ids of each text, each closed by `end_of_text`."""
    for batch in _batches(texts):
        for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
            yield np.array([*encoding.ids, end_of_text], dtype=np.int32)


@dataclass(frozen=True, kw_only=True)
class Spaces:
    """Which tokens are a word with its space, and what they are without it."""

    space: int
    """Id of the token that is one space; -1 if there is none."""
    bare: NDArray[np.int32]
    """By token id: the id of the same token without its leading space, or -1."""


def spaces(tokenizer: Tokenizer) -> Spaces:
    """The table of a byte-level vocabulary, in which a leading space is written `Ġ`."""
    vocab = tokenizer.get_vocab(with_added_tokens=False)
    bare = np.full(max(vocab.values()) + 1, -1, np.int32)
    for token, number in vocab.items():
        if token.startswith("Ġ") and token[1:2] not in ("", "Ġ"):
            bare[number] = vocab.get(token[1:], -1)
    return Spaces(space=vocab.get("Ġ", -1), bare=bare)


def loosen(tokens: NDArray[np.int32], table: Spaces, rate: float) -> NDArray[np.int32]:
    """`tokens` of the same text, a share `rate` of its words with their space as its own token.

    Byte-level BPE puts a space with the word that follows, so that a prompt that ends in a space
    ends in a token that a model never saw there. Tokenizing a share of the words otherwise
    teaches it: BPE dropout (Provilkov et al., 2020, arXiv:1910.13267) of this one merge. The
    choice depends on the tokens alone.
    """
    if not rate or table.space < 0:
        return tokens
    bare = np.where(tokens < len(table.bare), table.bare[tokens % len(table.bare)], -1)
    draws = np.random.default_rng(zlib.crc32(tokens.tobytes())).random(len(tokens))
    chosen = (bare >= 0) & (draws < rate)
    loose = np.repeat(tokens, 1 + chosen)
    first = np.flatnonzero(chosen) + np.arange(chosen.sum())
    loose[first], loose[first + 1] = table.space, bare[chosen]
    return loose


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    num_chars = 0
    for text in texts:
        batch.append(text)
        num_chars += len(text)
        if num_chars >= ENCODE_BATCH_BYTES:
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch


def pack(documents: Sequence[NDArray[np.int32]], sequence_length: int) -> NDArray[np.int32]:
    """The documents one after the other as int32 [blocks, sequence_length].

    What does not fill the last block is left out.
    """
    if not documents:
        return np.empty((0, sequence_length), np.int32)
    tokens = np.concatenate(documents)
    num_blocks = len(tokens) // sequence_length
    return tokens[: num_blocks * sequence_length].reshape(num_blocks, sequence_length)


def blocks_table(blocks: NDArray[np.int32]) -> pa.Table:
    """One column, `input_ids`: a list of int32 of fixed length in each row."""
    tokens = pa.array(blocks.reshape(-1), type=pa.int32())
    return pa.table({"input_ids": pa.FixedSizeListArray.from_arrays(tokens, blocks.shape[1])})


def documents_table(documents: Iterable[tuple[str, str]]) -> pa.Table:
    """Columns `id` and `text`."""
    rows = [{"id": key, "text": document} for key, document in documents]
    return pa.Table.from_pylist(rows, pa.schema({"id": pa.string(), "text": pa.large_string()}))


def parquet_bytes(table: pa.Table) -> bytes:
    """The table as a Parquet file."""
    buffer = io.BytesIO()
    pq.write_table(
        table, buffer, compression="zstd", row_group_size=ROW_GROUP_ROWS, use_dictionary=False
    )
    return buffer.getvalue()


def read_parquet(data: bytes) -> pa.Table:
    """A table from the bytes of a Parquet file."""
    return pq.read_table(pa.BufferReader(data))
