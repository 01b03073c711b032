"""Handing attempts to a cluster, and asking for their end; runs in threads, touches no state."""

from __future__ import annotations

import logging

from manta.cluster.record import ClusterRecord
from manta.errors import MantaError
from manta.jobs import packages, ray_api, reports
from manta.jobs.model import Attempt, Cause, JobRequest, JobState
from manta.jobs.policy import Outcome
from manta.jobs.ray_api import RayJob, Refused, Unreachable
from manta.spec import Resources, Retry

JOB_KEY, DIGEST_KEY = "manta_job", "manta_digest"
"""Ray metadata that says whose a submission is."""

log = logging.getLogger(__name__)


def submit(
    cluster: ClusterRecord, digest: str, request: JobRequest, attempt: Attempt
) -> Outcome | None:
    """Hand an attempt to Ray; None if it has it, or may have it: the next look will show."""
    try:
        reports.make_place(reports.url_of(request))
        for name in request.packages:
            if not ray_api.has_package(cluster, name):
                ray_api.put_package(cluster, name, packages.load(name, request.storage_url))
        ray_api.submit(
            cluster,
            submission_id=attempt.submission_id,
            entrypoint=request.entrypoint,
            runtime_env=request.runtime_env_passthrough,
            metadata={**request.metadata, JOB_KEY: request.id, DIGEST_KEY: digest},
            resources=Resources.model_validate_json(attempt.resources),
        )
    except Unreachable as error:
        log.info("%s: %s", attempt.submission_id, error)
        return None
    except Refused as error:
        return None if ray_api.is_duplicate(error) else refused(error.said)
    except Exception as error:  # its code cannot be read from storage, among others
        log.exception("%s", attempt.submission_id)
        return Outcome(state=JobState.FAILED, cause=Cause.UNKNOWN, message=str(error))
    return None


def refused(said: str) -> Outcome:
    """What becomes of an attempt that Ray did not take."""
    no_agent = "No available agent" in said
    cause = Cause.NO_AGENT if no_agent else Cause.REFUSED
    return Outcome(state=JobState.FAILED, cause=cause, message=said)


def plain_request(cluster: ClusterRecord, seen: RayJob) -> JobRequest:
    """What is kept of a job that came with plain `ray job submit`."""
    return JobRequest(
        id=seen.submission_id,
        name=seen.submission_id,
        entrypoint=seen.entrypoint,
        runtime_env_passthrough={},
        metadata=dict(seen.metadata),
        retry=Retry(max_retries=0),
        user="ray",
        cluster=cluster.name,
        storage_url=cluster.storage_url,
    )


def stop(cluster: ClusterRecord, submission_id: str) -> None:
    """Ask Ray to end an attempt; if it does not answer, it is asked again later."""
    try:
        ray_api.stop(cluster, submission_id)
    except MantaError as error:
        log.info("%s", error)
