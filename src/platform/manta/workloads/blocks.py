"""A prepared dataset's token blocks, in an order that is a pure function of seed and position.

An epoch visits every block once: Parquet row groups in a random order, and the rows of each in a
random order of their own. Both permutations come from (seed, epoch), so the block at any position
is found without replaying what came before: a resumed run starts reading where it stopped.
`jobs/prepare.py` writes documents in the order of their hashes, so a row group is already a random
sample of the text, and its rows need no wider shuffle.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from manta import storage
from manta.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

COLUMN = "input_ids"


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


@dataclass(frozen=True)
class Rows:
    """Rows of one row group, in the order in which they are wanted."""

    group: RowGroup
    rows: NDArray[np.int64]


def index(dataset_url: str, split: str, sequence_length: int) -> Blocks:
    """Read the Parquet footers of `train` or `validation`. Raises InputError if there are none."""
    files = [url for url in storage.glob(storage.join(dataset_url, split)) if _is_parquet(url)]
    groups = tuple(group for url in files for group in _row_groups(url))
    if not groups:
        raise InputError(f"{dataset_url} has no blocks in {split}/", "run jobs/prepare.py again")
    return Blocks(groups, sequence_length)


def shuffled(blocks: Blocks, seed: int, start: int, stop: int) -> list[Rows]:
    """Where the blocks at positions [start, stop) of the endless shuffled stream lie."""
    found: list[Rows] = []
    while start < stop:
        epoch, offset = divmod(start, blocks.num_rows)
        end = min(offset + stop - start, blocks.num_rows)
        found += _in_epoch(blocks, seed, epoch, offset, end)
        start += end - offset
    return found


def in_order(blocks: Blocks, count: int) -> list[Rows]:
    """Where the first `count` blocks lie, in file order; fewer if there are fewer."""
    found: list[Rows] = []
    for group in blocks.groups:
        taken = min(count, group.num_rows)
        if taken:
            found.append(Rows(group, np.arange(taken)))
        count -= taken
    return found


def read(blocks: Blocks, wanted: list[Rows]) -> NDArray[np.int32]:
    """The wanted blocks as int32 [rows, sequence_length]. Raises InputError on a damaged file."""
    parts = [_read_group(blocks, rows.group)[rows.rows] for rows in wanted]
    return np.concatenate(parts) if parts else np.empty((0, blocks.sequence_length), np.int32)


def _is_parquet(url: str) -> bool:
    return url.endswith(".parquet")


def _row_groups(url: str) -> list[RowGroup]:
    with _open(url) as file:
        counts = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
    return [RowGroup(url, i, count) for i, count in enumerate(counts) if count]


def _in_epoch(blocks: Blocks, seed: int, epoch: int, start: int, stop: int) -> list[Rows]:
    order = np.random.default_rng([seed, epoch]).permutation(len(blocks.groups))
    ends = np.cumsum([blocks.groups[i].num_rows for i in order])
    found = []
    for place in range(int(np.searchsorted(ends, start, side="right")), len(order)):
        group = blocks.groups[order[place]]
        first = int(ends[place]) - group.num_rows
        if first >= stop:
            break
        rows = np.random.default_rng([seed, epoch, int(order[place])]).permutation(group.num_rows)
        found.append(Rows(group, rows[max(start - first, 0) : stop - first]))
    return found


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
