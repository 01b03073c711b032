"""Run a planned pipeline: one step after the other, each remembered as soon as it has ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from manta import storage
from manta.cluster.record import ClusterRecord
from manta.errors import InputError, MantaError
from manta.jobs import queries, request, store
from manta.jobs.follow import follow
from manta.jobs.model import Job
from manta.plan.jobs import DeployAction, JobPlan, RunPlan, StepPlan
from manta.state import State


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """How one step ended."""

    name: str
    status: str
    """SUCCEEDED, FAILED or STOPPED, as Ray says it."""
    submission_id: str | None
    """The job's id; None for a deploy."""
    duration_s: float
    message: str = ""
    artifacts: Mapping[str, str] = field(default_factory=dict)
    """What the step made: name → URL."""

    @property
    def succeeded(self) -> bool:
        """Whether later steps may build on it."""
        return self.status == "SUCCEEDED"


class Watcher(Protocol):
    """What wants to know how a run goes on."""

    def started(self, step: StepPlan, number: int) -> None:
        """Step `number`, counted from 1, begins."""

    def log(self, text: str) -> None:
        """The running step wrote `text`."""

    def ended(self, result: StepResult, earlier: bool) -> None:
        """A step has ended; `earlier` if in a previous try of this run."""


@dataclass(frozen=True, kw_only=True)
class Clients:
    """How steps reach the cluster."""

    job: Callable[[JobPlan, Callable[[str], None]], Job]
    """Runs a job to its end, passing its log on."""
    deploy: Callable[[str], str]
    """Applies a Serve config file and returns its URL when it is healthy."""


def run_folder(run_id: str) -> str:
    """Folder of a run's record and reports under the storage root."""
    return storage.join(storage.root(), "runs", run_id)


def execute(
    plan: RunPlan, clients: Clients, watcher: Watcher, previous: Mapping[str, StepResult]
) -> tuple[StepResult, ...]:
    """Run the steps that have not yet succeeded; stops at the first that fails.

    Args:
        plan: what to do.
        clients: how to reach the cluster.
        watcher: told of each start, log line and end.
        previous: results of an earlier try of this run; what succeeded then is not run again.

    Returns:
        The results so far, in order; the last one tells whether the run succeeded.
    """
    results: list[StepResult] = []
    for number, step in enumerate(plan.steps, 1):
        earlier = previous.get(step.name)
        if earlier and earlier.succeeded:
            result = earlier
        else:
            watcher.started(step, number)
            result = _run_step(step, clients, watcher)
        results.append(result)
        _remember(plan, results)
        watcher.ended(result, earlier=result is earlier)
        if not result.succeeded:
            break
    return tuple(results)


def load(run_id: str) -> dict[str, StepResult]:
    """Results of a run by step name. Raises InputError if no such run is known."""
    url = storage.join(run_folder(run_id), "run.json")
    if not storage.exists(url):
        raise InputError(f"no run {run_id} under {storage.root()}", "see its folder `runs`")
    return {step["name"]: StepResult(**step) for step in storage.read_json(url)["steps"]}


def begin(plan: RunPlan) -> None:
    """Remember the run before its first step, so that it can be resumed from the start."""
    _remember(plan, [])


def _run_step(step: StepPlan, clients: Clients, watcher: Watcher) -> StepResult:
    if isinstance(step.action, DeployAction):
        return _deploy(step.name, step.action, clients)
    started = time.monotonic()
    job = clients.job(step.action, watcher.log)
    return StepResult(
        name=step.name,
        status=job.state,
        submission_id=job.id,
        duration_s=time.monotonic() - started,
        message=job.message,
        artifacts=_artifacts(step) if job.state == "SUCCEEDED" else {},
    )


def through_queue(
    state: State, cluster: ClusterRecord, working_dir: Path, keep: Callable[[], object]
) -> Callable[[JobPlan, Callable[[str], None]], Job]:
    """How a step's job runs: as any durable job. One that failed in an earlier try runs anew."""

    def run(plan: JobPlan, write: Callable[[str], None]) -> Job:
        job = queries.find(state, plan.submission_id)
        again = job is not None and job.state.done and job.state != "SUCCEEDED"
        if job is None:
            asked = request.prepare(
                plan,
                None,
                cluster=cluster.name,
                storage_url=cluster.storage_url,
                working_dir=working_dir,
            )
            job, _ = store.submit(state, asked, request.actor())
        elif again:
            store.retry(state, job.id, request.actor())
        return follow(
            state,
            plan.submission_id,
            write,
            lambda text: write(f"{text}\n"),
            keep,
            after_attempt=job.attempt if again else 0,
        )

    return run


def _deploy(name: str, action: DeployAction, clients: Clients) -> StepResult:
    started = time.monotonic()
    status, message, artifacts = "SUCCEEDED", "", {}
    try:
        artifacts = {"endpoint": clients.deploy(action.file)}
    except MantaError as error:
        status, message = "FAILED", str(error)
    return StepResult(
        name=name,
        status=status,
        submission_id=None,
        duration_s=time.monotonic() - started,
        message=message,
        artifacts=artifacts,
    )


def _artifacts(step: StepPlan) -> dict[str, str]:
    if not storage.exists(step.report_url):
        return {}  # a script of the user's own need not report
    found: dict[str, Any] = storage.read_json(step.report_url)["artifacts"]
    return {name: str(url) for name, url in found.items()}


def _remember(plan: RunPlan, results: list[StepResult]) -> None:
    storage.write_json(
        storage.join(run_folder(plan.run_id), "run.json"),
        {
            "run_id": plan.run_id,
            "pipeline": plan.pipeline,
            "steps": [asdict(result) for result in results],
        },
    )
