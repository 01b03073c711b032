"""Jobs of plain `ray job submit` that no controller has seen yet, asked of the cluster itself."""

from __future__ import annotations

from manta.cluster import record
from manta.cluster.record import ClusterRecord
from manta.errors import MantaError
from manta.jobs import queries, ray_api
from manta.jobs.handover import JOB_KEY
from manta.jobs.model import Cause, Job, JobState
from manta.jobs.policy import outcome_of
from manta.jobs.ray_api import RayJob
from manta.state import State

_STATES = {"PENDING": JobState.STARTING, "RUNNING": JobState.RUNNING}


def all_of(state: State, cluster: str | None) -> list[Job]:
    """Jobs on clusters that answer and are not in the state. A silent cluster is left out."""
    found = []
    for place in record.load_all():
        if cluster not in (None, place.name):
            continue
        try:
            jobs = ray_api.list_all(record.find(place.name))
        except MantaError:
            continue
        plain = [job for job in jobs if JOB_KEY not in job.metadata]
        known = queries.known(state, [job.submission_id for job in plain])
        found += [_as_job(place, job) for job in plain if job.submission_id not in known]
    return found


def find(job_id: str) -> tuple[ClusterRecord, RayJob]:
    """The job on whichever cluster has it. Raises InputError if none that answers has."""
    for place in record.load_all():
        try:
            reached = record.find(place.name)
            if (job := ray_api.find(reached, job_id)) is not None:
                return reached, job
        except MantaError:
            continue
    raise queries.unknown(job_id)


def _as_job(place: ClusterRecord, job: RayJob) -> Job:
    ended = outcome_of(job) if job.done else None
    return Job(
        id=job.submission_id,
        seq=0,
        version=0,
        state=ended.state if ended else _STATES[job.status],
        origin="ray",
        name=job.submission_id,
        user="ray",
        team="default",
        priority=0,
        cluster=place.name,
        clusters="",
        spill_after_s=0.0,
        queued_at=job.started_at or 0.0,
        shape="[]",
        digest="",
        entrypoint=job.entrypoint,
        storage_url=place.storage_url,
        attempt=1,
        num_failures=0,
        submitted_at=job.started_at or 0.0,
        not_before=0.0,
        deadline_at=None,
        started_at=job.started_at,
        ended_at=job.ended_at,
        cause=ended.cause if ended else Cause.NONE,
        message=ended.message if ended else "",
        stop_reason="",
    )
