"""Where things are broken: a queue on the shared cluster, and jobs that write down each run."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from terminal import MANTA, Terminal, until

from manta import state as states
from manta.jobs import queries, store
from manta.jobs.model import Job, JobRequest, JobState

QUICK = {"backoff_s": 0.2, "max_retries": 5}
"""Retries that a test need not wait for."""


@dataclass(frozen=True, kw_only=True)
class Tally:
    """What became of some jobs, counted from what they wrote down themselves."""

    ended: dict[str, int]
    """State → number of jobs."""
    num_attempts: int
    num_runs: int
    lost: tuple[str, ...]
    """Jobs that are not in the state, or never ran, though accepted."""
    twice: tuple[str, ...]
    """Attempts that ran more than once."""
    unknown: tuple[str, ...]
    """Runs of what is no attempt."""

    def __str__(self) -> str:
        return (
            f"{sum(self.ended.values())} jobs: {self.ended}; "
            f"{self.num_runs} runs for {self.num_attempts} attempts; "
            f"lost {len(self.lost)}, twice {len(self.twice)}, unknown {len(self.unknown)}"
        )

    @property
    def is_clean(self) -> bool:
        """Whether nothing was lost, and nothing ran that should not have."""
        return not (self.lost or self.twice or self.unknown)


class Arena:
    """A queue with a home, a state and a storage of its own, on a cluster that is shared."""

    def __init__(
        self, cluster: Terminal, folder: Path, *, database_url: str, storage_url: str = ""
    ) -> None:
        """Make sure that the cluster is up, and put it on record in a home in `folder`."""
        self._cluster, self._folder = cluster, folder
        self._storage_url = storage_url or str(folder / "storage")
        self.ran = folder / "ran"
        home = {"MANTA_HOME": str(folder / "home"), "MANTA_STATE": database_url}
        environment = cluster.environment | home | {"MANTA_STORAGE": self._storage_url}
        self.terminal = replace(cluster, environment=environment)
        if cluster(MANTA, "status", ok=None).returncode:
            self.replace_head()
        self._put_on_record()
        self.state = states.open_state(database_url)

    def replace_head(self) -> None:
        """`manta up`, as soon as the old head is known to be dead."""
        words = (MANTA, "up", "--ports", "auto")
        until(lambda: self._cluster(*words, ok=None).returncode == 0, "the head is replaced")
        self._put_on_record()

    def _put_on_record(self) -> None:
        source = self._cluster.home / "clusters" / "local" / "cluster.json"
        target = self.terminal.home / "clusters" / "local" / "cluster.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        known = json.loads(source.read_text()) | {"storage_url": self._storage_url}
        target.with_suffix(".new").write_text(json.dumps(known))
        target.with_suffix(".new").replace(target)

    @property
    def record(self) -> dict[str, Any]:
        """The cluster's record."""
        known = self.terminal.home / "clusters" / "local" / "cluster.json"
        found: dict[str, Any] = json.loads(known.read_text())
        return found

    def work(self) -> None:
        """See that a controller is at work."""
        self.terminal(MANTA, "jobs", "--limit", "1")

    def noted(self, work: str) -> str:
        """A command that writes down its run, in one line at once, and then does `work`."""
        return f"""printf '%s\\n' "$RAY_JOB_CONFIG_JSON_ENV_VAR" >> {self.ran}; {work}"""

    def request(self, job_id: str, work: str, **changes: Any) -> JobRequest:
        """A request for a job that does `work`."""
        values = {
            "id": job_id,
            "name": "chaos",
            "entrypoint": self.noted(work),
            "runtime_env_passthrough": {},
            "retry": QUICK,
            "user": "chaos",
            "cluster": "local",
            "storage_url": self._storage_url,
        }
        return JobRequest.model_validate(values | changes)

    def submit(self, job_id: str, work: str, **changes: Any) -> None:
        """Accept a job."""
        store.submit(self.state, self.request(job_id, work, **changes), "chaos")

    def job(self, job_id: str) -> Job:
        """The job as it is now."""
        return queries.get(self.state, job_id)

    def count(self, *wanted: JobState) -> int:
        """How many of our jobs are in one of those states."""
        return len([job for job in self._ours() if job.state in wanted])

    def all_end(self, timeout_s: float = 180) -> None:
        """Wait until every job has ended."""
        try:
            until(lambda: all(job.state.done for job in self._ours()), "all jobs end", timeout_s)
        except AssertionError as error:
            left = [job for job in self._ours() if not job.state.done]
            raise AssertionError(f"{error}: {left}") from None

    def causes(self, job_id: str) -> list[str]:
        """Why each of its attempts ended."""
        return [str(attempt.cause) for attempt in queries.attempts_of(self.state, job_id)]

    def num_runs(self) -> int:
        """How many runs have begun."""
        return len(_submission_ids(self.ran))

    def tally(self, ids: Collection[str]) -> Tally:
        """Count what became of the jobs that were accepted."""
        known = {job.id: job for job in self._ours()}
        attempts = {
            attempt.submission_id: attempt.job_id
            for job_id in known
            for attempt in queries.attempts_of(self.state, job_id)
        }
        runs = Counter(_submission_ids(self.ran))
        ran = {attempts[name] for name in runs if name in attempts}
        return Tally(
            ended=dict(Counter(str(job.state) for job in known.values())),
            num_attempts=len(attempts),
            num_runs=sum(runs.values()),
            lost=tuple(sorted(set(ids) - (known.keys() & ran))),
            twice=tuple(name for name, number in runs.items() if number > 1),
            unknown=tuple(name for name in runs if name not in attempts),
        )

    def _ours(self) -> list[Job]:
        """Without those of other tests, which the cluster remembers."""
        return [job for job in queries.listed(self.state) if job.origin == "manta"]


def _submission_ids(ran: Path) -> list[str]:
    lines = ran.read_text().splitlines() if ran.exists() else []
    return [json.loads(line)["metadata"]["job_submission_id"] for line in lines]


def is_one_line(text: str) -> bool:
    """Whether a complaint is for people: one line, perhaps one on what to do, no traceback."""
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return 1 <= len(lines) <= 2 and "Traceback" not in text


def each(number: int, name: str, act: Callable[[str], None]) -> list[str]:
    """Do something for `number` ids; returns them."""
    ids = [f"{name}{i}" for i in range(number)]
    for job_id in ids:
        act(job_id)
    return ids
