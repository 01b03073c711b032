"""Run a planned pipeline: one step after the other, each remembered as soon as it has ended."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from manta import storage
from manta.cluster.record import ClusterRecord
from manta.errors import InputError, MantaError
from manta.jobs import queries, request, store, unchanged
from manta.jobs.follow import follow
from manta.jobs.model import Job, JobRequest
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

    prepare: Callable[[JobPlan], JobRequest]
    """Ships what a step's job needs."""
    job: Callable[[JobRequest, Callable[[str], None]], Job]
    """Runs a job to its end, passing its log on."""
    deploy: Callable[[str], str]
    """Applies a Serve config file and returns its URL when it is healthy."""
    note: Callable[[RunPlan, Sequence[StepResult]], None]
    """Keeps in the state how far the run is, for all who look on."""


def run_folder(run_id: str) -> str:
    """Folder of a run's record and reports under the storage root."""
    return storage.join(storage.root(), "runs", run_id)


def execute(
    plan: RunPlan,
    clients: Clients,
    watcher: Watcher,
    previous: Mapping[str, StepResult],
    *,
    skip_unchanged: bool = False,
) -> tuple[StepResult, ...]:
    """Run the steps that have not yet succeeded; stops at the first that fails.

    Args:
        plan: what to do.
        clients: how to reach the cluster.
        watcher: told of each start, log line and end.
        previous: results of an earlier try of this run; what succeeded then is not run again.
        skip_unchanged: whether a step that another run has done, with the same code, config and
            steps before it, and whose result is still there, is taken from that.

    Returns:
        The results so far, in order; the last one tells whether the run succeeded.
    """
    results: list[StepResult] = []
    marks: dict[str, str] = {}
    clients.note(plan, list(previous.values()))
    for number, step in enumerate(plan.steps, 1):
        asked = clients.prepare(step.action) if isinstance(step.action, JobPlan) else None
        marks[step.name] = _mark(step, asked, marks)
        known = _known(step, previous, marks[step.name], skip_unchanged=skip_unchanged)
        result = known
        if result is None:
            watcher.started(step, number)
            result = _run_step(step, asked, clients, watcher)
            if result.succeeded and result.artifacts and asked:
                unchanged.remember(marks[step.name], asked.id, result.artifacts)
        results.append(result)
        _remember(plan, results)
        clients.note(plan, results)
        watcher.ended(result, earlier=known is not None)
        if not result.succeeded:
            break
    return tuple(results)


def _mark(step: StepPlan, asked: JobRequest | None, marks: Mapping[str, str]) -> str:
    before = {name: marks[name] for name in step.needs}
    if asked is not None:
        return unchanged.fingerprint(asked, before)
    assert isinstance(step.action, DeployAction)
    told = [Path(step.action.file).read_text() if Path(step.action.file).exists() else "", before]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _known(
    step: StepPlan, previous: Mapping[str, StepResult], mark: str, *, skip_unchanged: bool
) -> StepResult | None:
    """The result that the step has already; None if it must run."""
    if (earlier := previous.get(step.name)) and earlier.succeeded:
        return earlier
    if not skip_unchanged or isinstance(step.action, DeployAction):
        return None
    if (same := unchanged.find(mark)) is None:
        return None
    return StepResult(
        name=step.name,
        status="SUCCEEDED",
        submission_id=same.job_id,
        duration_s=0.0,
        message="unchanged",
        artifacts=same.artifacts,
    )


def load(run_id: str) -> dict[str, StepResult]:
    """Results of a run by step name. Raises InputError if no such run is known."""
    url = storage.join(run_folder(run_id), "run.json")
    if not storage.exists(url):
        raise InputError(f"no run {run_id} under {storage.root()}", "see its folder `runs`")
    return {step["name"]: StepResult(**step) for step in storage.read_json(url)["steps"]}


def begin(plan: RunPlan) -> None:
    """Remember the run before its first step, so that it can be resumed from the start."""
    _remember(plan, [])


def _run_step(
    step: StepPlan, asked: JobRequest | None, clients: Clients, watcher: Watcher
) -> StepResult:
    if isinstance(step.action, DeployAction):
        return _deploy(step.name, step.action, clients)
    assert asked is not None
    started = time.monotonic()
    job = clients.job(asked, watcher.log)
    return StepResult(
        name=step.name,
        status=job.state,
        submission_id=job.id,
        duration_s=time.monotonic() - started,
        message=job.message,
        artifacts=_artifacts(step) if job.state == "SUCCEEDED" else {},
    )


def preparer(cluster: ClusterRecord, working_dir: Path) -> Callable[[JobPlan], JobRequest]:
    """How a step's job becomes a request to `cluster`."""

    def prepare(plan: JobPlan) -> JobRequest:
        return request.prepare(
            plan,
            None,
            cluster=cluster.name,
            storage_url=cluster.storage_url,
            working_dir=working_dir,
        )

    return prepare


def through_queue(
    state: State, keep: Callable[[], object]
) -> Callable[[JobRequest, Callable[[str], None]], Job]:
    """How a step's job runs: as any durable job. One that failed in an earlier try runs anew."""

    def run(asked: JobRequest, write: Callable[[str], None]) -> Job:
        job = queries.find(state, asked.id)
        again = job is not None and job.state.done and job.state != "SUCCEEDED"
        if job is None:
            job, _ = store.submit(state, asked, request.actor())
        elif again:
            store.retry(state, job.id, request.actor())
        return follow(
            state,
            asked.id,
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
