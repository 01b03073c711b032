"""A prepared dataset's token blocks, in an order that is a pure function of seed and position.

An epoch visits every block once: Parquet row groups in a random order, and the rows of each
window of some row groups mixed. Both permutations come from (seed, epoch), so the block at any
position is found without replaying what came before: a resumed run starts reading where it
stopped. A process holds the decoded windows that it reads from, at most `WINDOWS_HELD` of
`WINDOW_TOKENS`; a dataset of less than one window is shuffled as a whole.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from manta import storage
from manta.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

COLUMN = "input_ids"
WINDOW_TOKENS = 16 * 2**20  # 64 MiB
WINDOWS_HELD = 2  # a batch may straddle two


@dataclass(frozen=True)
class RowGroup:
    """One Parquet row group: its file, its place in it, and its number of rows."""

    url: str
    index: int
    num_rows: int


@dataclass(frozen=True)
class Blocks:
    """One split of a dataset: its row groups in file order, and tokens a block."""

    groups: tuple[RowGroup, ...]
    sequence_length: int

    @property
    def num_rows(self) -> int:
        """Blocks in one epoch."""
        return sum(group.num_rows for group in self.groups)


def index(dataset_url: str, split: str, sequence_length: int) -> Blocks:
    """Read the Parquet footers of `train` or `validation`. Raises InputError if there are none."""
    files = [url for url in storage.glob(storage.join(dataset_url, split)) if _is_parquet(url)]
    groups = tuple(group for url in files for group in _row_groups(url))
    if not groups:
        raise InputError(f"{dataset_url} has no blocks in {split}/", "run jobs/prepare.py again")
    return Blocks(groups, sequence_length)


def shuffled(blocks: Blocks, seed: int, start: int, stop: int) -> NDArray[np.int32]:
    """The blocks at positions [start, stop) of the endless shuffled stream.

    Returns int32 [stop - start, sequence_length]. Raises InputError on a damaged file.
    """
    parts = [np.empty((0, blocks.sequence_length), np.int32)]
    while start < stop:
        epoch, offset = divmod(start, blocks.num_rows)
        end = min(offset + stop - start, blocks.num_rows)
        parts += _in_epoch(blocks, seed, epoch, offset, end)
        start += end - offset
    return np.concatenate(parts)


def first(blocks: Blocks, count: int) -> NDArray[np.int32]:
    """The first `count` blocks in file order, int32 [count, sequence_length]; all if fewer."""
    parts = [np.empty((0, blocks.sequence_length), np.int32)]
    for group in blocks.groups:
        if count > 0:
            parts.append(_read_group(blocks, group)[:count])
        count -= group.num_rows
    return np.concatenate(parts)


def _is_parquet(url: str) -> bool:
    return url.endswith(".parquet")


def _row_groups(url: str) -> list[RowGroup]:
    with _open(url) as file:
        counts = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
    return [RowGroup(url, i, count) for i, count in enumerate(counts) if count]


def _in_epoch(
    blocks: Blocks, seed: int, epoch: int, start: int, stop: int
) -> Iterator[NDArray[np.int32]]:
    """Positions [start, stop) of one epoch, a piece for each window that they touch."""
    order = np.random.default_rng([seed, epoch]).permutation(len(blocks.groups))
    size = _groups_per_window(blocks)
    begin = 0
    for number, place in enumerate(range(0, len(order), size)):
        window = tuple(int(i) for i in order[place : place + size])
        num_rows = sum(blocks.groups[i].num_rows for i in window)
        if begin < stop and begin + num_rows > start:
            rows = np.random.default_rng([seed, epoch, number]).permutation(num_rows)
            wanted = rows[max(start - begin, 0) : stop - begin]
            yield _decoded(blocks, window)[wanted]
        begin += num_rows


def _groups_per_window(blocks: Blocks) -> int:
    largest = max(group.num_rows for group in blocks.groups)
    return max(1, WINDOW_TOKENS // (largest * blocks.sequence_length))


@functools.lru_cache(maxsize=WINDOWS_HELD)
def _decoded(blocks: Blocks, window: tuple[int, ...]) -> NDArray[np.int32]:
    return np.concatenate([_read_group(blocks, blocks.groups[i]) for i in window])


def _read_group(blocks: Blocks, group: RowGroup) -> NDArray[np.int32]:
    import pyarrow as pa

    with _open(group.url) as file:
        try:
            column = file.read_row_group(group.index, columns=[COLUMN]).column(COLUMN)
            tokens = np.asarray(column.combine_chunks().flatten(), dtype=np.int32)
            return tokens.reshape(group.num_rows, blocks.sequence_length)
        except (pa.ArrowException, OSError, KeyError, ValueError) as error:
            raise InputError(
                f"{group.url}: not blocks of {blocks.sequence_length} tokens ({error})",
                "run jobs/prepare.py again",
            ) from None


def _open(url: str) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    filesystem, path = storage.arrow_filesystem(url)
    try:
        return pq.ParquetFile(path, filesystem=filesystem)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{url}: not a Parquet file, or cut short ({error})") from None
