"""Follows a job from anywhere: its state in the database, its log in storage."""

from __future__ import annotations

import codecs
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from manta.jobs import logs, queries
from manta.jobs.model import Attempt, Job
from manta.state import State

POLL_S = 0.2
KEEP_S = 2.0
_ALL = 2**62


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
    reading = _Reading(number=after_attempt, offset=_ALL)
    kept_at = time.monotonic()
    while True:
        if time.monotonic() > kept_at + KEEP_S:
            keep()
            kept_at = time.monotonic()
        mark = state.change_mark()
        job = queries.get(state, job_id)  # before the log: what was written until then is read
        for attempt in queries.attempts_of(state, job_id)[max(0, reading.number - 1) :]:
            reading.go_on(job, attempt, write, tell)
        if job.state.done:
            return job
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
