"""Run a planned pipeline: one step after the other, each remembered as soon as it has ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from manta import storage
from manta.errors import InputError, MantaError
from manta.jobs import ray_api
from manta.plan.jobs import DeployAction, JobPlan, RunPlan, StepPlan

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """How one step ended."""

    name: str
    status: str
    """SUCCEEDED, FAILED or STOPPED, as Ray says it."""
    submission_id: str | None
    """Ray's id of the job; None for a deploy."""
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

    jobs: JobSubmissionClient
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
    job_plan = _next_attempt(clients.jobs, step.action)
    ray_api.submit(clients.jobs, job_plan)
    job = ray_api.follow(clients.jobs, job_plan.submission_id, watcher.log)
    return StepResult(
        name=step.name,
        status=job.status,
        submission_id=job.submission_id,
        duration_s=time.monotonic() - started,
        message=job.message if job.status != "SUCCEEDED" else "",
        artifacts=_artifacts(step) if job.status == "SUCCEEDED" else {},
    )


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


def _next_attempt(client: JobSubmissionClient, plan: JobPlan) -> JobPlan:
    """The attempt to follow: one that runs or has succeeded, else a new one."""
    for attempt in _attempts(plan):
        job = ray_api.find(client, attempt.submission_id)
        if job is None or not job.done or job.status == "SUCCEEDED":
            return attempt
    raise AssertionError("attempts are endless")


def _attempts(plan: JobPlan) -> Iterator[JobPlan]:
    yield plan
    number = 2
    while True:
        yield replace(plan, submission_id=f"{plan.submission_id}-attempt-{number}")
        number += 1


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
