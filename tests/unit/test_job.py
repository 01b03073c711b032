"""What a training config is checked against before anything starts, and what a run is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from manta import storage
from manta.errors import InputError
from manta.spec import TrainConfig
from manta.workloads import job as jobs
from manta.workloads import train


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A storage root with dataset `tiny`: 20 blocks of 8 tokens."""
    monkeypatch.setenv(storage.ROOT_VARIABLE, str(tmp_path))
    folder = tmp_path / "datasets" / "tiny" / "v1"
    table = pa.table({"input_ids": pa.array([[0] * 8] * 20, pa.list_(pa.int32()))})
    for split in ("train", "validation"):
        (folder / split).mkdir(parents=True)
        pq.write_table(table, folder / split / "0.parquet")
    facts = {"version": "v1", "sequence_length": 8, "vocab_size": 300}
    (folder / "manifest.json").write_text(json.dumps(facts))
    storage.seal(str(folder))
    (folder.parent / "LATEST").write_text("v1")
    return tmp_path


def config(**changes: Any) -> TrainConfig:
    values = {
        "name": "run",
        "dataset": "tiny",
        "num_steps": 4,
        "global_batch_size": 4,
        "micro_batch_size": 2,
    }
    return TrainConfig.model_validate(values | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "none"}, "dataset `none` does not exist"),
        ({"dataset": "tiny@v9"}, "dataset `tiny@v9` does not exist"),
        ({"global_batch_size": 32}, "20 training blocks, fewer than one global batch of 32"),
    ],
)
def test_a_config_that_does_not_fit_its_dataset_is_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        jobs.prepare(config(**changes))


def test_blocks_longer_than_the_models_positions_are_refused(root: Path) -> None:
    manifest = root / "datasets" / "tiny" / "v1" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"sequence_length": 16}))
    storage.seal(str(manifest.parent))
    with pytest.raises(InputError, match=r"blocks of 16 tokens, over model\.max_position"):
        jobs.prepare(config(model={"max_position_embeddings": 8}))


def test_a_dataset_that_was_never_finished_is_refused(root: Path) -> None:
    (root / "datasets" / "tiny" / "v1" / storage.SEAL).unlink()
    with pytest.raises(InputError, match="never finished"):
        jobs.prepare(config())


def test_workers_micro_batches_and_logging_do_not_make_another_run() -> None:
    same = config(micro_batch_size=1, scaling={"num_workers": 4}, log_every_steps=1)
    assert jobs.prepare(same).identity == jobs.prepare(config()).identity


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"num_hidden_layers": 2}},
        {"optimizer": {"beta2": 0.5}},
        {"num_steps": 5},
        {"seed": 1},
        {"global_batch_size": 8},
    ],
)
def test_what_changes_the_result_makes_another_run(changes: dict[str, Any]) -> None:
    assert jobs.prepare(config(**changes)).identity != jobs.prepare(config()).identity


def test_best_parameters_of_a_search_replace_the_configs(root: Path) -> None:
    (root / "tune" / "found").mkdir(parents=True)
    (root / "tune" / "found" / "best.yaml").write_text("optimizer.learning_rate: 0.5\n")
    tuned = train.with_tuned(config(tuned="found"))
    assert tuned.optimizer.learning_rate == 0.5
    assert tuned.optimizer.beta2 == config().optimizer.beta2


def test_a_search_that_was_never_made_is_refused() -> None:
    with pytest.raises(InputError, match=r"run jobs/tune\.py with that name first"):
        train.with_tuned(config(tuned="none"))


@pytest.mark.parametrize("key", ["optimizer.speed", "speed", "optimizer.beta2.deep"])
def test_an_unknown_key_cannot_be_set(key: str) -> None:
    with pytest.raises(InputError, match=f"`{key}` is no key"):
        jobs.override(config(), {key: 1})


def test_a_value_that_does_not_fit_is_named_in_one_line() -> None:
    with pytest.raises(InputError, match=r"^`optimizer\.beta2` cannot be 7: [^\n]*$"):
        jobs.override(config(), {"optimizer.beta2": 7})
