"""Job and pipeline files: checks before anything starts, and the plan they become."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from manta.check import work
from manta.errors import InvalidSpec
from manta.plan.jobs import DeployAction, JobPlan, plan_job, plan_run
from manta.spec import JobSpec, PipelineSpec, Resources, Step

STEP = "  - {{name: {name}, entrypoint: 'true', needs: [{needs}]}}\n"


def _pipeline(folder: Path, *steps: tuple[str, str]) -> str:
    lines = [STEP.format(name=name, needs=needs) for name, needs in steps]
    file = folder / "p.yaml"
    file.write_text("name: p\nsteps:\n" + "".join(lines))
    return str(file)


def _fault(file: str, root: Path) -> str:
    with pytest.raises(InvalidSpec) as caught:
        work.load_pipeline(file, root)
    return str(caught.value)


def test_a_circle_of_needs_is_refused_with_its_steps(tmp_path: Path) -> None:
    file = _pipeline(tmp_path, ("a", ""), ("b", "c"), ("c", "b"))
    assert f"{file}:4: steps wait for each other in a circle: b, c" in _fault(file, tmp_path)


def test_an_unknown_need_and_a_repeated_name_are_refused(tmp_path: Path) -> None:
    file = _pipeline(tmp_path, ("a", "z"), ("a", ""))
    faults = _fault(file, tmp_path)
    assert f"{file}:3: step `a` needs `z`, which is no step here" in faults
    assert f"{file}:4: two steps are named `a`" in faults


def test_a_missing_script_config_or_serve_file_is_told_before_anything_starts(
    tmp_path: Path,
) -> None:
    file = tmp_path / "p.yaml"
    file.write_text(
        "name: p\nsteps:\n  - name: a\n    entrypoint: python gone.py\n    config: gone.yaml\n"
        "  - name: b\n    deploy: gone-too.yaml\n"
    )
    faults = _fault(str(file), tmp_path)
    assert f"{file}:4: `entrypoint` names gone.py" in faults
    assert f"{file}:5: `config` names gone.yaml" in faults
    assert f"{file}:7: `deploy` names gone-too.yaml" in faults


def test_a_fault_in_a_workloads_config_is_told_with_that_files_line(tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs/train.py").touch()
    (tmp_path / "train.yaml").write_text("name: x\ndataset: d\nnum_step: 3\nnum_steps: 3\n")
    file = tmp_path / "p.yaml"
    file.write_text(
        "name: p\nsteps: [{name: a, entrypoint: python jobs/train.py, config: train.yaml}]\n"
    )
    assert "train.yaml:3: unknown key `num_step`; did you mean" in _fault(str(file), tmp_path)


def test_steps_run_in_the_order_of_their_needs_else_as_written(tmp_path: Path) -> None:
    steps = (
        Step(name="late", entrypoint="true", needs=("first", "second")),
        Step(name="first", entrypoint="true"),
        Step(name="second", deploy="app.yaml", needs=("first",)),
    )
    spec = PipelineSpec(name="p", steps=steps)
    plan = plan_run(spec, run_id="r", working_dir=tmp_path, run_url="/runs/r", environment={})
    assert [step.name for step in plan.steps] == ["first", "second", "late"]
    assert plan.steps[1].action == DeployAction(file="app.yaml")
    first = plan.steps[0].action
    assert isinstance(first, JobPlan)
    assert first.submission_id == "r-first"
    assert first.runtime_env_passthrough["env_vars"] == {"MANTA_REPORT": "/runs/r/first.json"}


def test_the_printed_command_carries_all_of_the_plan(tmp_path: Path) -> None:
    spec = JobSpec(
        name="x",
        entrypoint="python a.py",
        config="my config.yaml",
        resources=Resources(num_cpus=0.5, num_gpus=1, memory_bytes=7, custom={"disk": 2}),
        environment={"A": "1"},
    )
    plan = plan_job(spec, spec.entrypoint, submission_id="x-1", working_dir=tmp_path)
    words = shlex.split(plan.ray_command())
    assert words[:5] == ["ray", "job", "submit", "--submission-id", "x-1"]
    runtime_env = json.loads(words[words.index("--runtime-env-json") + 1])
    assert runtime_env["working_dir"] == str(tmp_path)
    assert runtime_env["env_vars"] == {"A": "1"}
    assert words[words.index("--entrypoint-num-cpus") + 1] == "0.5"
    assert words[words.index("--entrypoint-num-gpus") + 1] == "1"
    assert words[words.index("--entrypoint-memory") + 1] == "7"
    assert json.loads(words[words.index("--entrypoint-resources") + 1]) == {"disk": 2}
    assert words[words.index("--") + 1 :] == ["python", "a.py", "--config", "my config.yaml"]


def test_the_users_runtime_env_wins_and_environments_merge(tmp_path: Path) -> None:
    spec = JobSpec.model_validate(
        {
            "name": "x",
            "entrypoint": "true",
            "runtime_env": {"working_dir": "s3://b/w.zip", "pip": ["x"], "env_vars": {"A": "1"}},
            "environment": {"B": "2"},
        }
    )
    plan = plan_job(
        spec, "true", submission_id="x", working_dir=tmp_path, environment={"A": "0", "C": "3"}
    )
    assert plan.runtime_env_passthrough["working_dir"] == "s3://b/w.zip"
    assert plan.runtime_env_passthrough["pip"] == ["x"]
    assert plan.runtime_env_passthrough["env_vars"] == {"A": "1", "B": "2", "C": "3"}


def test_the_projects_own_pipeline_and_job_files_have_no_faults() -> None:
    root = Path(__file__).parents[2]
    for file in sorted(root.glob("configs/pipelines/*.yaml")):
        assert work.load_pipeline(str(file), root).steps
    for file in sorted(root.glob("configs/jobs/*.yaml")):
        assert work.load_job(str(file), root).name
