"""Walks pipeline runs: begins each step when all that it needs has succeeded, side by side.

A part of the controller. What takes time (storage, deploys) is done by threads of its pool; what
is decided is written down by its one thread, so that a successor goes on from there: it reads what
a step made again, deploys again, and the job of a step that had begun is there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from manta.errors import InputError, MantaError
from manta.jobs import reports, runs, unchanged
from manta.jobs.lease import Lease
from manta.jobs.model import JobRequest, JobState
from manta.jobs.run_request import StepRequest, filled
from manta.jobs.runs import WAITING, Run, RunStep
from manta.state import State

T = TypeVar("T")
Say = Callable[[str], None]
Deploy = Callable[[str, str, str, Say], str]
"""(cluster, name of a Serve config, its text, takes remarks) → URL, when it is healthy."""

TRIES = 4
"""Of what asks storage, with 1, 2, 4 s between: it fails now and then."""
MAX_CHANGES = 50
"""Of steps in one tick: jobs of everybody wait for its end."""
NOT_RUN = (JobState.FAILED, JobState.STOPPED)
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Result:
    """What a thread found out about a step. With `end` it has ended so; else it may begin."""

    end: JobState | None = None
    job: JobRequest | None = None
    mark: str = ""
    message: str = ""
    artifacts: Mapping[str, str] = field(default_factory=dict)
    job_id: str = ""
    """Of the earlier run that did the same."""


class Walker:
    """The controller's part that knows of pipelines."""

    def __init__(
        self,
        state: State,
        lease: Lease,
        wake: Callable[[], None],
        deploy: Deploy | None,
    ) -> None:
        self._state, self._lease, self._wake = state, lease, wake
        self._deploy = deploy
        # Not the controller's: deploys last minutes, and looks at clusters must not wait for them.
        self._pool = ThreadPoolExecutor(max_workers=8, thread_name_prefix="pipelines")
        self._flights: dict[tuple[str, str], tuple[RunStep, Future[_Result]]] = {}
        self._said: dict[tuple[str, str], str] = {}
        self._look = True
        self._budget, self._landed = MAX_CHANGES, False
        self.unfinished: list[Run] = []

    def tick(self, *, changed: bool) -> None:
        """Take in what threads have found; go on, if something is new."""
        if not (changed or self._look or self._said or self._has_landed()):
            return
        self._look = True  # if this is cut short by an error, the next tick looks again
        self._budget, self._landed = MAX_CHANGES, False
        self.unfinished = runs.unfinished(self._state)
        for run in self.unfinished:
            self._guarded_walk(run)
        self._forget({run.id for run in self.unfinished})
        # What was found may have been dropped, and told by no event.
        self._look = self._landed or self._budget <= 0

    def close(self) -> None:
        """Begin nothing more."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _has_landed(self) -> bool:
        return any(flight.done() for _, flight in self._flights.values())

    def _forget(self, walked: set[str]) -> None:
        """Drop what threads found for runs that were stopped meanwhile."""
        for key in [k for k, (_, f) in self._flights.items() if k[0] not in walked and f.done()]:
            del self._flights[key]
        for key in [key for key in self._said if key[0] not in walked]:
            self._said.pop(key, None)

    def _guarded_walk(self, run: Run) -> None:
        """Never let one run hold up the others."""
        try:
            self._walk(run)
        except MantaError:
            raise  # the state or the lease
        except Exception:
            log.exception("run %s", run.id)

    def _walk(self, run: Run) -> None:
        by_name = {step.name: step for step in run.steps}
        for step in run.steps:
            key = (run.id, step.name)
            if said := self._said.pop(key, ""):
                runs.say(self._state, self._lease, run, step.name, said)
            if self._budget <= 0:
                return
            if (flight := self._flights.get(key)) is None:
                self._go_on(run, step, by_name)
            elif flight[1].done():
                self._budget -= 1
                del self._flights[key]
                self._land(run, flight[0], flight[1].result())
                self._landed = True
                self._wake()  # what follows from it is for the next tick
        if not run.alive:
            runs.end(self._state, self._lease, run.id)

    def _go_on(self, run: Run, step: RunStep, by_name: Mapping[str, RunStep]) -> None:
        """Start what the step needs next, in a thread; nothing if it waits or its job runs."""
        if step.settled:
            return
        if step.state == WAITING:
            if all(by_name[need].succeeded for need in step.needs):
                self._fly(run, step, self._prepare, by_name)
        elif step.job_id is None:
            self._fly(run, step, self._apply)
        elif step.state == JobState.SUCCEEDED:
            self._fly(run, step, self._collect)
        elif step.state in NOT_RUN:
            end = JobState(step.state)
            runs.settle_step(self._state, self._lease, run, step, end, message=step.message)
            self._budget -= 1
            self._wake()

    def _fly(self, run: Run, step: RunStep, work: Callable[..., _Result], *more: object) -> None:
        self._budget -= 1
        asked = runs.request_of(self._state, run.id, step.name)
        flight = self._pool.submit(_guarded, work, run, step, asked, *more)
        flight.add_done_callback(lambda _: self._wake())
        self._flights[run.id, step.name] = step, flight

    def _land(self, run: Run, step: RunStep, found: _Result) -> None:
        """Write it down; `step` is as it was when the thread began."""
        held = (self._state, self._lease, run, step)
        if found.end is not None:
            runs.settle_step(
                *held,
                found.end,
                message=found.message,
                artifacts=found.artifacts,
                mark=found.mark,
                job_id=found.job_id,
            )
            return
        try:
            runs.begin_step(*held, found.job, found.mark)
        except InputError as error:
            runs.settle_step(*held, JobState.FAILED, message=str(error))

    # -- In threads --

    def _prepare(
        self, run: Run, step: RunStep, asked: StepRequest, by_name: Mapping[str, RunStep]
    ) -> _Result:
        """What the step does exactly, now that all before it is known, and whether it must."""
        before = {need: by_name[need].mark for need in step.needs}
        if asked.deploy is not None:
            told = [asked.deploy.text, before]
            text = json.dumps(told, sort_keys=True)
            return _Result(mark=hashlib.sha256(text.encode()).hexdigest())
        assert asked.job is not None
        made = {need: by_name[need].artifacts for need in step.needs}
        job = filled(asked.job, made)
        mark = unchanged.fingerprint(job, before)
        same = None
        if run.skip_unchanged:
            same = _patiently(lambda: unchanged.find(mark, run.storage_url))
        if same is None:
            return _Result(job=job, mark=mark)
        return _Result(
            end=JobState.SUCCEEDED,
            mark=mark,
            message=unchanged.MESSAGE,
            artifacts=same.artifacts,
            job_id=same.job_id,
        )

    def _apply(self, run: Run, step: RunStep, asked: StepRequest) -> _Result:
        """Deploy; a successor of a controller that ended meanwhile does it once more."""
        assert asked.deploy is not None
        if self._deploy is None:
            raise MantaError("this controller deploys nothing")

        def say(text: str) -> None:
            self._said[run.id, step.name] = text
            self._wake()

        url = self._deploy(run.cluster, asked.deploy.name, asked.deploy.text, say)
        self._said.pop((run.id, step.name), None)
        return _Result(end=JobState.SUCCEEDED, artifacts={"endpoint": url})

    def _collect(self, run: Run, step: RunStep, asked: StepRequest) -> _Result:
        """What the step's job has made; kept, so that it need not be done again."""
        assert step.job_id is not None
        artifacts = _patiently(lambda: reports.read(asked.report_url)).artifacts
        if artifacts:
            try:
                unchanged.remember(step.mark, step.job_id, artifacts, run.storage_url)
            except Exception as error:  # read with rights that only the job may have
                log.warning("%s: %s; it will not be skipped", step.job_id, error)
        return _Result(end=JobState.SUCCEEDED, artifacts=artifacts)


def _patiently(work: Callable[[], T]) -> T:
    """What `work` returns; tried again while storage fails."""
    for number in range(TRIES - 1):
        try:
            return work()
        except (MantaError, OSError) as error:  # storage tells an outage as what cannot be read
            log.info("%s", error)
            time.sleep(2**number)
    return work()


def _guarded(work: Callable[..., _Result], *arguments: object) -> _Result:
    """A step whose work fails has failed, whatever it was."""
    try:
        return work(*arguments)
    except MantaError as error:
        return _Result(end=JobState.FAILED, message=str(error))
    except Exception as error:
        log.exception("a step of a run")
        return _Result(end=JobState.FAILED, message=f"{type(error).__name__}: {error}")
