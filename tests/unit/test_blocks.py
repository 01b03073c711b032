"""The order of training blocks: whole epochs, the same from any position, the same batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from manta.errors import InputError
from manta.workloads import blocks
from manta.workloads.ingest import Share

LENGTH = 4
FILES = (7, 5)  # rows of each file


@pytest.fixture(params=[1, 2, 100], ids=lambda groups: f"{groups}-groups-a-window")
def dataset(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> blocks.Blocks:
    monkeypatch.setattr(blocks, "WINDOW_TOKENS", request.param * 3 * LENGTH)
    first = 0
    for number, count in enumerate(FILES):
        rows = [[row] * LENGTH for row in range(first, first + count)]
        table = pa.table({"input_ids": pa.array(rows, pa.list_(pa.int32()))})
        (tmp_path / "train").mkdir(exist_ok=True)
        pq.write_table(table, tmp_path / "train" / f"{number}.parquet", row_group_size=3)
        first += count
    return blocks.index(str(tmp_path), "train", LENGTH)


def ids(dataset: blocks.Blocks, start: int, stop: int, seed: int = 0) -> list[int]:
    return blocks.shuffled(dataset, seed, start, stop)[:, 0].tolist()


def test_an_epoch_visits_every_block_once_in_another_order_each_time(
    dataset: blocks.Blocks,
) -> None:
    first, second = ids(dataset, 0, 12), ids(dataset, 12, 24)
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second


def test_any_position_gives_what_reading_from_the_start_gives(dataset: blocks.Blocks) -> None:
    stream = ids(dataset, 0, 40)
    for start, stop in [(0, 1), (5, 9), (11, 13), (3, 40), (24, 24)]:
        assert ids(dataset, start, stop) == stream[start:stop]


def test_another_seed_is_another_order(dataset: blocks.Blocks) -> None:
    assert ids(dataset, 0, 12, seed=0) != ids(dataset, 0, 12, seed=1)


@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_a_steps_batch_is_the_same_for_any_number_of_workers(
    dataset: blocks.Blocks, num_workers: int
) -> None:
    shares = [
        Share(
            blocks=dataset,
            seed=0,
            global_batch_size=4,
            micro_batch_size=1,
            rank=rank,
            num_workers=num_workers,
        )
        for rank in range(num_workers)
    ]
    parts = [share.read(2, 5)[:, 0].reshape(3, -1) for share in shares]
    assert np.concatenate(parts, axis=1).reshape(-1).tolist() == ids(dataset, 8, 20)


def test_the_first_blocks_come_in_file_order(dataset: blocks.Blocks) -> None:
    assert blocks.first(dataset, 8)[:, 0].tolist() == list(range(8))
    assert len(blocks.first(dataset, 99)) == 12


def test_blocks_of_another_length_are_refused(dataset: blocks.Blocks) -> None:
    other = blocks.Blocks(dataset.groups, LENGTH + 1)
    with pytest.raises(InputError, match="not blocks of 5 tokens"):
        blocks.first(other, 1)


def test_a_file_that_is_cut_short_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "0.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(InputError, match="cut short"):
        blocks.index(str(tmp_path), "train", LENGTH)


def test_a_split_without_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no blocks in validation/"):
        blocks.index(str(tmp_path), "validation", LENGTH)


def test_a_window_mixes_the_rows_of_its_row_groups(
    dataset: blocks.Blocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "WINDOW_TOKENS", 1000)
    batches = [ids(dataset, start, start + 4) for start in (0, 4, 8)]
    files = [{int(row >= FILES[0]) for row in batch} for batch in batches]
    assert {0, 1} in files
