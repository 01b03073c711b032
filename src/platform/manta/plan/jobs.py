"""What submitting a job or running a pipeline will do, as values; no network is touched."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import manta
from manta.plan.demand import Demand, demand_of_work
from manta.spec import PipelineSpec, Resources, Retry, Step, Work


@dataclass(frozen=True, kw_only=True)
class JobPlan:
    """One submission to Ray's job API."""

    submission_id: str
    entrypoint: str
    runtime_env_passthrough: Mapping[str, Any]
    """Ray's own runtime_env, with working_dir, py_modules and env_vars filled in."""
    resources: Resources = field(default_factory=Resources)
    metadata: Mapping[str, str] = field(default_factory=dict)
    retry: Retry = field(default_factory=Retry)
    timeout_s: float | None = None
    demand: Demand = field(default_factory=Demand)
    """What it asks of a cluster, as far as its files tell."""

    def ray_command(self) -> str:
        """The plain command that this plan stands for; Ray itself knows no retry or time-out."""
        words = ["ray", "job", "submit", "--submission-id", self.submission_id]
        words += ["--runtime-env-json", json.dumps(self.runtime_env_passthrough, sort_keys=True)]
        words += _resource_options(self.resources)
        if self.metadata:
            words += ["--metadata-json", json.dumps(self.metadata, sort_keys=True)]
        return f"{shlex.join(words)} -- {self.entrypoint}"


@dataclass(frozen=True, kw_only=True)
class DeployAction:
    """One Serve config to apply."""

    file: str

    def ray_command(self) -> str:
        """The plain command that this plan stands for."""
        return shlex.join(["serve", "deploy", self.file])


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """One step of a run; `report_url` is where its job writes what it made."""

    name: str
    action: JobPlan | DeployAction
    report_url: str
    needs: tuple[str, ...] = ()
    """Steps before it."""


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """A pipeline run: its steps in the order they will run."""

    run_id: str
    pipeline: str
    steps: tuple[StepPlan, ...]


def plan_job(
    work: Work,
    entrypoint: str,
    *,
    submission_id: str,
    working_dir: Path,
    environment: Mapping[str, str] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> JobPlan:
    """Plan one job: the config becomes an argument, the working directory is shipped."""
    command = entrypoint
    if work.config:
        entrypoint = f"{entrypoint} --config {shlex.quote(work.config)}"
    return JobPlan(
        submission_id=submission_id,
        entrypoint=entrypoint,
        runtime_env_passthrough=_runtime_env(work, working_dir, environment or {}),
        resources=work.resources,
        metadata=metadata or {},
        retry=work.retry,
        timeout_s=work.timeout_s,
        demand=demand_of_work(work, command, working_dir, submission_id),
    )


def plan_run(
    spec: PipelineSpec,
    *,
    run_id: str,
    working_dir: Path,
    run_url: str,
    environment: dict[str, str],
) -> RunPlan:
    """Plan a whole pipeline run; `run_url` is the folder of the run's reports."""
    steps = []
    for step in in_order(spec.steps):
        report_url = f"{run_url}/{step.name}.json"
        steps.append(
            StepPlan(
                name=step.name,
                action=_action(step, run_id, working_dir, environment, report_url),
                report_url=report_url,
                needs=step.needs,
            )
        )
    return RunPlan(run_id=run_id, pipeline=spec.name, steps=tuple(steps))


def in_order(steps: Sequence[Step]) -> list[Step]:
    """Steps so that each comes after what it needs, else as written. The checks forbid cycles."""
    waiting, ordered = list(steps), list[Step]()
    while waiting:
        done = {step.name for step in ordered}
        ready = next(step for step in waiting if set(step.needs) <= done)
        waiting.remove(ready)
        ordered.append(ready)
    return ordered


def _action(
    step: Step, run_id: str, working_dir: Path, environment: dict[str, str], report_url: str
) -> JobPlan | DeployAction:
    if step.deploy:
        return DeployAction(file=step.deploy)
    assert step.entrypoint
    return plan_job(
        step,
        step.entrypoint,
        submission_id=f"{run_id}-{step.name}",
        working_dir=working_dir,
        environment={**environment, "MANTA_REPORT": report_url},
        metadata={"manta_run": run_id, "manta_step": step.name},
    )


def _runtime_env(work: Work, working_dir: Path, environment: Mapping[str, str]) -> dict[str, Any]:
    """Manta's runtime_env under the user's: theirs wins, env_vars are merged key by key."""
    given = dict(work.runtime_env_passthrough)
    env_vars = {**environment, **given.pop("env_vars", {}), **work.environment}
    return {
        "working_dir": str(working_dir),
        # A working_dir alone does not make the package importable in Ray's workers.
        "py_modules": [str(Path(manta.__file__).parent)],
        **given,
        **({"env_vars": env_vars} if env_vars else {}),
    }


def _resource_options(resources: Resources) -> list[str]:
    options = []
    if resources.num_cpus:
        options += ["--entrypoint-num-cpus", f"{resources.num_cpus:g}"]
    if resources.num_gpus:
        options += ["--entrypoint-num-gpus", f"{resources.num_gpus:g}"]
    if resources.memory_bytes:
        options += ["--entrypoint-memory", str(resources.memory_bytes)]
    if resources.custom:
        options += ["--entrypoint-resources", json.dumps(resources.custom, sort_keys=True)]
    return options
