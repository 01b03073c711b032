"""Documents of one shard to token blocks and Parquet bytes; the same in, the same bytes out."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
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
