"""Parameters and matrices of pipelines: which steps run, in which order, with which values."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from manta.check import work
from manta.errors import InputError, InvalidSpec
from manta.plan.jobs import in_order
from manta.spec import Step

SWEEP = """\
name: sweep
params:
  dataset:
  steps: 40
steps:
  - name: train
    matrix: {lr: [0.001, 0.003], seed: [1, 2]}
    entrypoint: python x.py --set optimizer.learning_rate=${{ matrix.lr }} -s ${{matrix.seed}}
    environment: {DATASET: "${{ params.dataset }}"}
  - name: score
    needs: [train]
    matrix: {seed: [1, 2]}
    entrypoint: python x.py ${{ matrix.seed }} ${{ params.steps }}
  - name: best
    needs: [score, train]
    entrypoint: python x.py
"""


def steps(folder: Path, text: str, given: Mapping[str, str] | None = None) -> dict[str, Step]:
    (folder / "x.py").touch()
    (folder / "p.yaml").write_text(text)
    spec = work.load_pipeline(str(folder / "p.yaml"), folder, given)
    return {step.name: step for step in in_order(spec.steps)}


def test_a_step_runs_once_for_each_combination_after_those_that_agree_with_it(
    tmp_path: Path,
) -> None:
    found = steps(tmp_path, SWEEP, {"dataset": "small"})
    trains = ["train-0.001-1", "train-0.001-2", "train-0.003-1", "train-0.003-2"]
    assert list(found) == [*trains, "score-1", "score-2", "best"]
    assert found["score-2"].needs == ("train-0.001-2", "train-0.003-2")
    assert found["best"].needs == ("score-1", "score-2", *trains)
    command = "python x.py --set optimizer.learning_rate=0.003 -s 1"
    assert found["train-0.003-1"].entrypoint == command
    assert found["score-1"].entrypoint == "python x.py 1 40"
    assert found["train-0.001-1"].environment == {"DATASET": "small"}


def test_a_given_value_is_one_word_of_the_command_whatever_it_is(tmp_path: Path) -> None:
    text = (
        "name: p\nparams: {what: a}\nsteps: [{name: s, entrypoint: 'echo ${{ params.what }}'}]\n"
    )
    assert steps(tmp_path, text)["s"].entrypoint == "echo a"
    found = steps(tmp_path, text, {"what": "a; rm -rf ${{ params.what }}"})
    assert found["s"].entrypoint == "echo 'a; rm -rf ${{ params.what }}'"


def test_a_file_is_looked_for_under_the_name_that_the_parameters_give(tmp_path: Path) -> None:
    text = (
        "name: p\nparams: {size: null}\nsteps:\n"
        "  - {name: s, entrypoint: python x.py, config: 'c-${{ params.size }}.yaml'}\n"
    )
    (tmp_path / "c-small.yaml").write_text("a: 1\n")
    assert steps(tmp_path, text, {"size": "small"})["s"].config == "c-small.yaml"
    with pytest.raises(InvalidSpec, match=r"p.yaml:4: `config` names c-huge.yaml"):
        steps(tmp_path, text, {"size": "huge"})


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "parameter `dataset` has no value; give --param dataset=VALUE"),
        ({"dataset": "d", "data": "x"}, "has no parameter `data`; known: dataset, steps"),
    ],
)
def test_parameters_that_lack_or_are_unknown_are_told(
    tmp_path: Path, given: dict[str, str], told: str
) -> None:
    with pytest.raises(InputError, match=told):
        steps(tmp_path, SWEEP, given)


@pytest.mark.parametrize(
    ("step", "told"),
    [
        (
            "entrypoint: 'x ${{ params.gone }}'",
            "p.yaml:3: `${{ params.gone }}` stands for nothing",
        ),
        ("entrypoint: 'x ${{ matrix.lr }}'", "p.yaml:3: `${{ matrix.lr }}` stands for nothing"),
        ("entrypoint: x, environment: {A: '${{ a }}'}", "p.yaml:3: `${{ a }}` stands for nothing"),
        ("entrypoint: x, matrix: {a: [1, '1']}", "p.yaml:3: two steps run as `s-1`"),
        ("entrypoint: x, matrix: {a: []}", "p.yaml:3: `steps.0.matrix.a` is []"),
        (
            "entrypoint: x, matrix: {a: 3}",
            "p.yaml:3: `steps.0.matrix.a` is 3; input should be a list",
        ),
        ("entrypoint: x, matrix: {a: [[1]]}", "p.yaml:3: `steps.0.matrix.a.0`: not one value"),
        ("entrypoint: x, matrix: {a: [null]}", "p.yaml:3: `steps.0.matrix.a.0`"),
        (
            f"entrypoint: x, matrix: {{a: {list(range(40))}, b: {list(range(40))}}}",
            "more than 1000 steps",
        ),
    ],
)
def test_what_stands_for_nothing_or_is_too_much_is_told_with_its_line(
    tmp_path: Path, step: str, told: str
) -> None:
    with pytest.raises(InvalidSpec) as refused:
        steps(tmp_path, f"name: p\nsteps:\n  - {{name: s, {step}}}\n")
    lines = [str(finding) for finding in refused.value.findings]
    assert len(lines) == 1, lines
    assert told in lines[0]


def test_the_check_of_a_file_needs_no_values(tmp_path: Path) -> None:
    from manta import check

    (tmp_path / "x.py").touch()
    (tmp_path / "p.yaml").write_text(SWEEP)
    assert check.files([tmp_path / "p.yaml"], tmp_path) == ()


OUTPUTS = """\
name: p
steps:
  - name: train
    matrix: {lr: [1, 2]}
    entrypoint: python x.py ${{ matrix.lr }}
  - name: score
    needs: [train]
    matrix: {lr: [1, 2]}
    entrypoint: python x.py ${{needs.train.outputs.model}}
    environment: {MODEL: "${{ needs.train.outputs.model }}"}
  - name: best
    needs: [train]
    entrypoint: python x.py ${{ needs.train-2.outputs.model }}
"""


def test_an_output_names_the_step_that_agrees_and_stays_open_until_it_has_run(
    tmp_path: Path,
) -> None:
    found = steps(tmp_path, OUTPUTS)
    assert found["score-1"].entrypoint == "python x.py ${{ needs.train-1.outputs.model }}"
    assert found["score-2"].environment == {"MODEL": "${{ needs.train-2.outputs.model }}"}
    assert found["best"].entrypoint == "python x.py ${{ needs.train-2.outputs.model }}"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("needs.train-2.outputs", "needs.train.outputs"),  # which of the two?
        ("needs.train-2.outputs", "needs.score.outputs"),  # it is not among `needs`
        ("entrypoint: python x.py ${{ needs.train-2", "deploy: x.py ${{ needs.train-2"),
    ],
)
def test_an_output_of_no_step_before_or_of_several_is_a_fault_with_its_line(
    tmp_path: Path, old: str, new: str
) -> None:
    with pytest.raises(InvalidSpec) as told:
        steps(tmp_path, OUTPUTS.replace(old, new))
    finding = next(f for f in told.value.findings if f.rule == "unknown-reference")
    assert finding.line == 13
    assert "of `needs` (train)" in finding.fix
