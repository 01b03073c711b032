"""What a user writes: every fault is one line with file, line, and what to write instead."""

from __future__ import annotations

from pathlib import Path

import pytest

from manta import spec
from manta.errors import InputError, InvalidSpec

TRAIN = """\
name: run
dataset: data
num_steps: 10
global_batch_size: 32
optimizer:
  learning_rate: 0.001
"""


def _write(folder: Path, text: str | bytes) -> Path:
    file = folder / "train.yaml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return file


def _faults(file: Path, model: type[spec.Spec] = spec.TrainConfig) -> list[str]:
    with pytest.raises(InvalidSpec) as caught:
        spec.load(file, model)
    assert caught.value.exit_code == 2
    return str(caught.value).replace(str(file), "train.yaml").splitlines()


def test_a_good_file_becomes_a_frozen_model(tmp_path: Path) -> None:
    config = spec.load(_write(tmp_path, TRAIN), spec.TrainConfig)
    assert config.optimizer.learning_rate == 0.001
    with pytest.raises(ValueError, match="frozen"):
        config.num_steps = 11  # type: ignore[misc]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("learning_rate", "learning_rat"), "train.yaml:6: unknown key `optimizer.learning_rat`"),
        (("learning_rate", "learning_rat"), "did you mean `learning_rate`?"),
        (("num_steps: 10", "num_steps: ten"), "train.yaml:3: `num_steps` is 'ten'"),
        (("num_steps: 10", "num_steps: 0"), "train.yaml:3: `num_steps` is 0"),
        (("name: run\n", ""), "`name` is missing; add `name: …`"),
        (("name: run", "name: Run 1"), "train.yaml:1: `name` is 'Run 1'"),
        (("size: 32", "size: 30"), "global_batch_size 30 is not a multiple of"),
        (("size: 32", "size: 30"), "write e.g. global_batch_size: 32"),
        (("num_steps: 10", "num_steps: [1"), "train.yaml:4: not valid YAML"),
    ],
)
def test_a_fault_is_named_with_its_line_and_the_remedy(
    tmp_path: Path, change: tuple[str, str], expected: str
) -> None:
    assert change[0] in TRAIN
    faults = _faults(_write(tmp_path, TRAIN.replace(*change)))
    assert expected in "\n".join(faults)


def test_all_faults_of_a_file_are_told_at_once(tmp_path: Path) -> None:
    text = TRAIN.replace("num_steps: 10", "num_steps: ten").replace("dataset", "datasets")
    assert len(_faults(_write(tmp_path, text))) == 3  # unknown, missing, wrong type


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"\xff\xfename", "not UTF-8 text"),
        (b"", "expected `key: value` lines"),
        (b"- a\n- b\n", "expected `key: value` lines"),
    ],
)
def test_what_is_no_yaml_mapping_is_refused(tmp_path: Path, content: bytes, expected: str) -> None:
    assert expected in _faults(_write(tmp_path, content))[0]


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    assert _faults(tmp_path / "train.yaml") == [
        "train.yaml: cannot be read: No such file or directory"
    ]


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    overrides = ["num_steps=5", "optimizer.learning_rate=0.01", "scaling.num_workers=1"]
    config = spec.load(_write(tmp_path, TRAIN), spec.TrainConfig, overrides)
    assert config.num_steps == 5
    assert config.optimizer.learning_rate == 0.01
    assert config.scaling.num_workers == 1


def test_an_override_without_a_value_is_bad_usage(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected KEY=VALUE"):
        spec.load(_write(tmp_path, TRAIN), spec.TrainConfig, ["num_steps"])


def test_an_unknown_key_in_a_list_of_models_names_the_element(tmp_path: Path) -> None:
    text = "name: p\nsteps:\n  - name: a\n    entrypoint: 'true'\n    need: [b]\n"
    faults = _faults(_write(tmp_path, text), spec.PipelineSpec)
    assert faults == ["train.yaml:5: unknown key `steps.0.need`; did you mean `needs`?"]


def test_a_step_that_does_two_things_is_refused(tmp_path: Path) -> None:
    text = "name: p\nsteps:\n  - name: a\n    entrypoint: 'true'\n    deploy: x.yaml\n"
    faults = _faults(_write(tmp_path, text), spec.PipelineSpec)
    assert "train.yaml:3: `steps.0`: give either entrypoint or deploy" in faults[0]
