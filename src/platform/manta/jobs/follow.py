"""Follows jobs and runs from anywhere: their state in the database, their logs in storage."""

from __future__ import annotations

import codecs
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from manta.errors import InputError, MantaError
from manta.jobs import logs, queries, runs, unchanged
from manta.jobs.model import Attempt, Job
from manta.jobs.runs import Run, RunStep
from manta.state import State

POLL_S = 0.2
KEEP_S = 2.0
PATIENCE_S = 60.0
AGAIN_S = 1.0
_ALL = 2**62

log = logging.getLogger(__name__)


def follow(
    state: State,
    job_id: str,
    write: Callable[[str], None],
    tell: Callable[[str], None],
    keep: Callable[[], object],
    *,
    after_attempt: int = 0,
) -> Job:
    """Pass the log of each attempt on as it grows; returns the job when it has ended.

    Args:
        state: where the job is.
        job_id: of a job that exists.
        write: takes pieces of the log.
        tell: takes remarks, each a line.
        keep: called every few seconds; sees that a controller is at work.
        after_attempt: logs up to that of this attempt are left out.
    """
    reading, patience = _Reading(number=after_attempt, offset=_ALL), _Patience()
    for _ in _looks(state, keep):
        with patience:
            job = queries.get(state, job_id)  # before the log: what was written until then is read
            reading.go_on(state, job, write, tell)
            if job.state.done:
                return job
    raise AssertionError("unreachable")


class Watcher(Protocol):
    """What wants to know how a run goes on."""

    def started(self, step: RunStep, number: int) -> None:
        """Step `number`, counted from 1, began."""

    def log(self, step: RunStep, text: str) -> None:
        """A running step wrote `text`."""

    def ended(self, step: RunStep) -> None:
        """A step has ended."""


def follow_run(
    state: State,
    run_id: str,
    watcher: Watcher,
    keep: Callable[[], object],
    *,
    after_attempts: Mapping[str, int] | None = None,
) -> Run:
    """Tell `watcher` of each step's start, log and end; returns the run when it has ended.

    Args:
        state: where the run is.
        run_id: of a run that exists.
        watcher: told of each start, piece of log, and end.
        keep: called every few seconds; sees that a controller is at work.
        after_attempts: job id → its attempt until which logs are left out.
    """
    readings: dict[str, _Reading] = {}
    said: dict[str, str] = {}
    ended: set[str] = set()
    patience = _Patience()
    for _ in _looks(state, keep):
        with patience:
            run = runs.get(state, run_id)
            for number, step in enumerate(run.steps, 1):
                if step.state == runs.WAITING or step.name in ended:
                    continue
                if step.name not in readings:
                    after = (after_attempts or {}).get(step.job_id or "", 0)
                    readings[step.name] = _Reading(number=after, offset=_ALL)
                    watcher.started(step, number)
                if step.job_id is None and step.message not in ("", said.get(step.name)):
                    said[step.name] = step.message
                    watcher.log(step, f"{step.message}\n")
                _read_on(state, step, readings[step.name], watcher)
                if step.settled or run.done:
                    ended.add(step.name)
                    watcher.ended(step)
            if run.done:
                return run
    raise AssertionError("unreachable")


def _read_on(state: State, step: RunStep, reading: _Reading, watcher: Watcher) -> None:
    if step.message == unchanged.MESSAGE or not step.job_id:
        return  # its log is that of another run, or there is none
    if (job := queries.find(state, step.job_id)) is None:
        return

    def write(text: str) -> None:
        watcher.log(step, text)

    reading.go_on(state, job, write, lambda text: write(f"{text}\n"))


class _Patience:
    """Passes over a database or a controller that is away for a while: the work goes on without.

    Raises what it passed over when that has lasted for PATIENCE_S.
    """

    def __init__(self) -> None:
        self._since: float | None = None

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> bool:
        if error is None:
            self._since = None
        if not isinstance(error, MantaError) or isinstance(error, InputError):
            return False
        if self._since is None:
            self._since = time.monotonic()
            log.warning("%s (waiting)", error)
        time.sleep(AGAIN_S)
        return time.monotonic() < self._since + PATIENCE_S


def _looks(state: State, keep: Callable[[], object]) -> Iterator[None]:
    """Yields at once and then whenever there may be something new, for ever."""
    kept_at, patience = time.monotonic(), _Patience()
    while True:
        with patience:
            if time.monotonic() > kept_at + KEEP_S:
                keep()
                kept_at = time.monotonic()
            mark = state.change_mark()
            yield
            deadline = time.monotonic() + POLL_S
            while time.monotonic() < deadline and state.change_mark() == mark:
                time.sleep(state.listen_s)


@dataclass
class _Reading:
    """How far the logs of a job have been read."""

    number: int
    offset: int
    decoder: codecs.IncrementalDecoder = field(
        default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace")
    )

    def go_on(
        self,
        state: State,
        job: Job,
        write: Callable[[str], None],
        tell: Callable[[str], None],
    ) -> None:
        for attempt in queries.attempts_of(state, job.id)[max(0, self.number - 1) :]:
            self._go_on(job, attempt, write, tell)

    def _go_on(
        self,
        job: Job,
        attempt: Attempt,
        write: Callable[[str], None],
        tell: Callable[[str], None],
    ) -> None:
        if attempt.number > self.number:
            if attempt.number > 1:
                tell(f"-- attempt {attempt.number} of {job.id} --")
            self.number, self.offset = attempt.number, 0
        url = logs.folder(job.storage_url, job.id, attempt.number)
        for data in logs.read(url, self.offset):
            self.offset += len(data)
            write(self.decoder.decode(data))
