"""The durable queue for Python programs.

    from manta.client import Client

    client = Client()
    job = client.submit("python train.py", working_dir="project", job_id="nightly")
    if client.wait(job.id).state != "SUCCEEDED":
        print(client.log(job.id)[-1000:])

It works on the state that `$MANTA_STATE` names, as the commands do, and errors are theirs:
`InputError` for what cannot be, `MantaError` for what failed.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Collection, Iterator
from pathlib import Path

from manta import state as states
from manta.errors import InputError, MantaError
from manta.jobs import daemon, logs, queries, request, spending, store
from manta.jobs.costs import Cost
from manta.jobs.model import Attempt, Event, Job, JobState
from manta.plan.jobs import plan_job
from manta.spec import JobSpec

__all__ = ["Attempt", "Client", "Cost", "Event", "Job", "JobSpec", "JobState"]

POLL_S = 0.1


class Client:
    """A connection to the state.

    Args:
        database_url: where the state is; if None `$MANTA_STATE`, or SQLite in Manta's home.
    """

    def __init__(self, database_url: str | None = None) -> None:
        self._url = database_url or states.url()
        self._state = states.open_state(self._url)

    def submit(
        self,
        job: JobSpec | str,
        *,
        working_dir: str | Path = ".",
        job_id: str | None = None,
        cluster: str = "local",
    ) -> Job:
        """Accept a job: a spec, or a shell command. The same id again is the same job.

        Raises:
            InputError: the id is another job's, the cluster is unknown, the spec cannot be used.
        """
        spec = JobSpec(name="job", entrypoint=job) if isinstance(job, str) else job
        root = Path(working_dir).resolve()
        if not root.is_dir():
            raise InputError(f"working_dir {working_dir} is not a folder")
        name = job_id or f"{spec.name}-{secrets.token_hex(4)}"
        plan = plan_job(spec, spec.entrypoint, submission_id=name, working_dir=root)
        spec = request.placed(spec, plan)
        cluster = spec.clusters[0] if spec.clusters else cluster
        asked = request.prepare(
            plan,
            spec,
            cluster=cluster,
            storage_url=request.storage_of(self._state, cluster),
            working_dir=root,
        )
        accepted, _ = store.submit(self._state, asked, request.actor())
        self._keep()
        return accepted

    def get(self, job_id: str) -> Job:
        """The job as it is now. Raises InputError if there is none."""
        return queries.get(self._state, job_id)

    def jobs(
        self,
        *,
        states: Collection[JobState] = (),
        user: str | None = None,
        team: str | None = None,
        cluster: str | None = None,
        limit: int | None = None,
    ) -> list[Job]:
        """Jobs in the order of their submission; with `limit` the newest so many."""
        return queries.listed(
            self._state, states=states, user=user, team=team, cluster=cluster, limit=limit
        )

    def wait(self, job_id: str, timeout_s: float | None = None) -> Job:
        """The job when it has ended. Raises MantaError if it has not within `timeout_s`."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not (job := self.get(job_id)).state.done:
            if deadline is not None and time.monotonic() > deadline:
                raise MantaError(f"job {job_id} is {job.state} after {timeout_s:g} s")
            self._keep()
            time.sleep(POLL_S)
        return job

    def stop(self, job_id: str) -> Job:
        """Ask for the job's end; returns at once. Asking again changes nothing."""
        job = store.ask_stop(self._state, job_id, request.actor(), f"stopped by {request.me()}")
        self._keep()
        return job

    def retry(self, job_id: str) -> Job:
        """Put a job that failed back into the queue. Raises InputError for any other."""
        job = store.retry(self._state, job_id, request.actor())
        self._keep()
        return job

    def log(self, job_id: str, attempt: int | None = None) -> str:
        """What the job has written, as far as it is in storage; of its newest attempt if None."""
        job = self.get(job_id)
        url = logs.folder(job.storage_url, job.id, attempt or job.attempt)
        return b"".join(logs.read(url)).decode(errors="replace")

    def attempts(self, job_id: str) -> list[Attempt]:
        """The job's attempts, first to last."""
        return queries.attempts_of(self._state, job_id)

    def events(self, job_id: str | None = None, after_seq: int = 0) -> Iterator[Event]:
        """What happened since event `after_seq`, to one job or to everything."""
        yield from queries.events_of(self._state, job_id=job_id, after_seq=after_seq)

    def costs(self, by: spending.By = "team", days: float = 30.0) -> dict[str, Cost]:
        """Owner → what it cost in the last `days`; the owner "" is what was idle.

        All together are what the clusters cost.
        """
        return spending.report(self._state, by, states.now() - days * 86_400)

    def _keep(self) -> None:
        daemon.ensure(self._state, self._url)
