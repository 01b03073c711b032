"""What running a pipeline asks for, complete: with it a controller can walk the run alone."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from manta import storage
from manta.errors import InputError
from manta.jobs import reports, request
from manta.jobs.model import JobRequest, check_id
from manta.plan.jobs import DeployAction, RunPlan, StepPlan
from manta.spec.expand import OUTPUT


class ServeFile(BaseModel):
    """A Serve config as it was when the run began."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    text: str


class StepRequest(BaseModel):
    """One step: a job, or a Serve config to deploy."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    needs: tuple[str, ...] = ()
    job: JobRequest | None = None
    deploy: ServeFile | None = None
    report_url: str = ""
    """Where its job writes what it made; a script of the user's own need not."""

    def same(self, other: StepRequest) -> bool:
        """Whether both do the same, so that a job of the one serves for the other."""
        if self.job is None or other.job is None or self.needs != other.needs:
            return self.deploy == other.deploy and self.needs == other.needs
        # Not by digest: a default 0 that was written and read again is 0.0, and has another.
        renamed = other.job.model_copy(update={"id": self.job.id})
        return self.job.content() == renamed.content()


class RunRequest(BaseModel):
    """A run: its steps, each after those that it needs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    pipeline: str
    cluster: str
    storage_url: str
    skip_unchanged: bool = False
    steps: tuple[StepRequest, ...]


def report_url(storage_url: str, run_id: str, step: str) -> str:
    """Where a step of a run writes what it made."""
    return storage.join(storage_url, "runs", run_id, f"{step}.json")


def prepare(
    plan: RunPlan,
    *,
    cluster: str,
    storage_url: str,
    working_dir: Path,
    skip_unchanged: bool = False,
) -> RunRequest:
    """Make a planned run complete: ships its code, reads its Serve configs.

    Raises:
        InputError: as `request.prepare`, or a name is too long for a job's id.
        MantaError: the storage cannot be written.
    """
    steps = [_step(step, cluster, storage_url, working_dir) for step in plan.steps]
    return RunRequest(
        id=check_id(plan.run_id),
        pipeline=plan.pipeline,
        cluster=cluster,
        storage_url=storage_url,
        skip_unchanged=skip_unchanged,
        steps=tuple(steps),
    )


def with_id(run: RunRequest, run_id: str) -> RunRequest:
    """The same run under another id, with jobs and reports of its own."""
    steps = tuple(_renamed(step, run.storage_url, run_id) for step in run.steps)
    return run.model_copy(update={"id": check_id(run_id), "steps": steps})


def filled(job: JobRequest, made: Mapping[str, Mapping[str, str]]) -> JobRequest:
    """The job with what the steps before it made: `made` has step → artifact → URL.

    Raises InputError if one has not made what the job names.
    """

    def value(match: re.Match[str]) -> str:
        step, name = match.groups()
        if (url := made.get(step, {}).get(name)) is None:
            told = ", ".join(made.get(step, {})) or "nothing that it reported"
            raise InputError(f"step {step} has made no `{name}`", f"it made: {told}")
        return url

    runtime_env = dict(job.runtime_env_passthrough)
    if variables := runtime_env.get("env_vars"):
        runtime_env["env_vars"] = {n: OUTPUT.sub(value, text) for n, text in variables.items()}
    entrypoint = OUTPUT.sub(lambda match: shlex.quote(value(match)), job.entrypoint)
    return job.model_copy(
        update={"entrypoint": entrypoint, "runtime_env_passthrough": runtime_env}
    )


def _step(step: StepPlan, cluster: str, storage_url: str, working_dir: Path) -> StepRequest:
    if isinstance(step.action, DeployAction):
        file = working_dir / step.action.file
        deploy = ServeFile(name=step.action.file, text=file.read_text())
        return StepRequest(name=step.name, needs=step.needs, deploy=deploy)
    where = {"cluster": cluster, "storage_url": storage_url, "working_dir": working_dir}
    job = request.prepare(step.action, None, **where)  # type: ignore[arg-type]
    return StepRequest(name=step.name, needs=step.needs, job=job, report_url=step.report_url)


def _renamed(step: StepRequest, storage_url: str, run_id: str) -> StepRequest:
    if step.job is None:
        return step
    url = report_url(storage_url, run_id, step.name)
    runtime_env = dict(step.job.runtime_env_passthrough)
    runtime_env["env_vars"] = {**runtime_env.get("env_vars", {}), reports.VARIABLE: url}
    told = {"id": check_id(f"{run_id}-{step.name}"), "runtime_env_passthrough": runtime_env}
    told |= {"name": told["id"], "metadata": {**step.job.metadata, "manta_run": run_id}}
    return step.model_copy(update={"report_url": url, "job": step.job.model_copy(update=told)})
