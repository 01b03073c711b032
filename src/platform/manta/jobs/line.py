"""The waiting line: queued jobs, grouped as a pass looks at them and kept so one by one.

A queue may be very long and most of it alike. So the groups are kept up while jobs come and go,
and a pass looks at the head of each group and not at each job.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping
from operator import itemgetter

from manta.jobs.books import Key, Waiting
from manta.jobs.policy import MAX_BACKOFF_S

_key = itemgetter(3, 5, 4, 6, 7)  # priority, team, user, cluster, shape: where `Waiting` has them


def key_of(job: Waiting) -> Key:
    """The group of a job: all who are alike to a pass but for the time of their arrival."""
    key: Key = _key(job)
    return key


class Line:
    """Queued jobs by id; iterates over all of them."""

    def __init__(self, jobs: Iterable[Waiting] = ()) -> None:
        self._jobs: dict[str, Waiting] = {}
        self.movable: dict[str, Waiting] = {}
        """Those of them that may run on more than one cluster."""
        self._groups: dict[Key, dict[str, Waiting]] = {}
        self._unsorted: set[Key] = set()
        self._newest: dict[Key, int] = {}
        self._pauses: list[tuple[float, str]] = []
        self._deadlines: list[tuple[float, str]] = []
        for job in jobs:
            self.put(job)

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Iterator[Waiting]:
        return iter(self._jobs.values())

    def __getitem__(self, job_id: str) -> Waiting:
        return self._jobs[job_id]

    def clusters(self) -> set[str]:
        """Names of the clusters that someone waits for, or may; pauses left out."""
        return {key[3] for key in self._groups} | {
            name for job in self.movable.values() for name in job.clusters.split()
        }

    def put(self, job: Waiting) -> None:
        """Add a job, or replace what is known of it."""
        self.remove(job.id)
        self._jobs[job.id] = job
        if job.clusters:
            self.movable[job.id] = job
        if job.deadline_at is not None:
            heapq.heappush(self._deadlines, (job.deadline_at, job.id))
        if job.not_before > 0:
            heapq.heappush(self._pauses, (job.not_before, job.id))
        else:
            self._join(job)

    def remove(self, job_id: str) -> None:
        """Take a job out; it is no error if it is not there."""
        job = self._jobs.pop(job_id, None)
        if job is None:
            return
        self.movable.pop(job_id, None)
        key = key_of(job)
        group = self._groups.get(key, {})
        group.pop(job_id, None)
        if not group:
            self._groups.pop(key, None)
            self._newest.pop(key, None)

    def expired(self, now: float) -> list[str]:
        """Ids of jobs whose deadline has passed."""
        late = []
        while self._deadlines and self._deadlines[0][0] < now:
            at, job_id = heapq.heappop(self._deadlines)
            job = self._jobs.get(job_id)
            if job is not None and job.deadline_at == at:
                late.append((at, job_id))
        for item in late:  # until whoever asked has ended them
            heapq.heappush(self._deadlines, item)
        return [job_id for _, job_id in late]

    def groups(self, now: float) -> Mapping[Key, Mapping[str, Waiting]]:
        """Jobs that may start at `now`, each group first in first out."""
        # One longer than there is was told by a clock that has been put back since.
        while self._pauses and not now < self._pauses[0][0] <= now + MAX_BACKOFF_S:
            at, job_id = heapq.heappop(self._pauses)
            job = self._jobs.get(job_id)
            if job is not None and job.not_before == at:
                self._join(job)
        for key in self._unsorted & self._groups.keys():
            members = sorted(self._groups[key].items(), key=lambda item: item[1].seq)
            self._groups[key] = dict(members)
        self._unsorted.clear()
        return self._groups

    def _join(self, job: Waiting) -> None:
        key = key_of(job)
        self._groups.setdefault(key, {})[job.id] = job
        if job.seq < self._newest.get(key, 0):  # it was here before, and comes back
            self._unsorted.add(key)
        self._newest[key] = max(self._newest.get(key, 0), job.seq)
