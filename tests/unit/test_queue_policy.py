"""Why an attempt ended, and what follows: pure functions of what Ray says."""

from __future__ import annotations

from typing import Any

import pytest
from queue_state import request

from manta.jobs import policy
from manta.jobs.model import Cause, JobState
from manta.jobs.policy import Outcome
from manta.jobs.ray_api import RayJob


def ray_job(**changes: Any) -> RayJob:
    values: dict[str, Any] = {
        "submission_id": "a",
        "status": "FAILED",
        "entrypoint": "true",
        "message": "",
        "error_type": "JOB_ENTRYPOINT_COMMAND_ERROR",
        "exit_code": 1,
        "node_id": "n",
        "metadata": {},
        "started_at": 1.0,
        "ended_at": 2.0,
    }
    return RayJob(**(values | changes))


UNEXPECTED = """\
Job supervisor actor died: The actor died unexpectedly before finishing this task.
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit \
detail: Worker unexpectedly exits with a connection error code 2. End of file. There are some \
potential root causes. (1) The process is killed by SIGKILL by OOM killer due to high memory \
usage. (2) ray stop --force is called. (3) The worker is crashed unexpectedly due to SIGSEGV."""
DIED = {"error_type": "JOB_SUPERVISOR_ACTOR_DIED", "exit_code": None}


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"message": "…\nValueError: bad"}, Cause.USER_ERROR),
        ({"exit_code": 137}, Cause.OUT_OF_MEMORY),
        ({"exit_code": -9}, Cause.OUT_OF_MEMORY),
        ({"message": "ray.exceptions.OutOfMemoryError: Task was killed"}, Cause.OUT_OF_MEMORY),
        ({"message": "torch.OutOfMemoryError: CUDA out of memory."}, Cause.OUT_OF_MEMORY),
        ({"message": "ray.exceptions.NodeDiedError: …"}, Cause.NODE_LOST),
        ({"message": "ray.exceptions.WorkerCrashedError: The worker died"}, Cause.UNKNOWN),
        (DIED | {"message": "The actor died because its node has died."}, Cause.NODE_LOST),
        (DIED | {"message": "the node was preempted"}, Cause.PREEMPTED),
        (DIED | {"message": "something else"}, Cause.UNKNOWN),
        (DIED | {"message": UNEXPECTED}, Cause.UNKNOWN),
        ({"error_type": "RUNTIME_ENV_SETUP_FAILURE", "exit_code": None}, Cause.ENVIRONMENT),
        (
            {"error_type": "JOB_SUPERVISOR_ACTOR_START_TIMEOUT", "exit_code": None},
            Cause.NO_RESOURCES,
        ),
        (
            {"error_type": "JOB_SUPERVISOR_ACTOR_UNSCHEDULABLE", "exit_code": None},
            Cause.NO_RESOURCES,
        ),
    ],
)
def test_the_cause_is_read_off_what_ray_says(changes: dict[str, Any], cause: Cause) -> None:
    outcome = policy.outcome_of(ray_job(**changes))
    assert (outcome.state, outcome.cause) == (JobState.FAILED, cause)


def failed(cause: Cause) -> Outcome:
    return Outcome(state=JobState.FAILED, cause=cause, message="why")


def after(outcome: Outcome, *, stop_reason: str = "", num_failures: int = 0, **retry: Any) -> Any:
    asked = request(retry=retry)
    return policy.after(
        asked, outcome, num_failures=num_failures, stop_reason=stop_reason, now=100.0
    )


@pytest.mark.parametrize(
    "cause",
    [
        Cause.NODE_LOST,
        Cause.PREEMPTED,
        Cause.HEAD_GONE,
        Cause.OUT_OF_MEMORY,
        Cause.NO_AGENT,
        Cause.NO_RESOURCES,
        Cause.UNKNOWN,
    ],
)
def test_what_the_platform_did_is_retried(cause: Cause) -> None:
    assert after(failed(cause)).state is JobState.QUEUED


@pytest.mark.parametrize("cause", [Cause.USER_ERROR, Cause.ENVIRONMENT, Cause.REFUSED])
def test_what_the_user_did_is_not_retried(cause: Cause) -> None:
    assert after(failed(cause)).state is JobState.FAILED


def test_the_users_exception_is_retried_when_asked() -> None:
    assert after(failed(Cause.USER_ERROR), on=["user_error"]).state is JobState.QUEUED


def test_retries_end() -> None:
    assert after(failed(Cause.NODE_LOST), num_failures=2, max_retries=3).state is JobState.QUEUED
    assert after(failed(Cause.NODE_LOST), num_failures=3, max_retries=3).state is JobState.FAILED


def test_the_pause_before_a_retry_doubles_up_to_a_limit() -> None:
    pauses = [
        after(failed(Cause.NODE_LOST), num_failures=n, max_retries=99).not_before - 100
        for n in (0, 1, 2, 3, 50)
    ]
    assert pauses == [5, 10, 20, 40, policy.MAX_BACKOFF_S]


def test_a_job_that_was_told_to_stop_is_stopped_however_it_ended() -> None:
    verdict = after(failed(Cause.NODE_LOST), stop_reason="stopped by ann")
    assert (verdict.state, verdict.cause) == (JobState.STOPPED, Cause.STOPPED)


def test_a_job_that_succeeded_before_the_stop_reached_it_has_succeeded() -> None:
    done = Outcome(state=JobState.SUCCEEDED, cause=Cause.NONE, message="")
    assert after(done, stop_reason="stopped by ann").state is JobState.SUCCEEDED


def test_a_time_out_fails_and_is_retried_only_when_asked() -> None:
    stopped = Outcome(state=JobState.STOPPED, cause=Cause.STOPPED, message="")
    verdict = after(stopped, stop_reason="timeout: over 5 s")
    assert (verdict.state, verdict.cause) == (JobState.FAILED, Cause.TIMEOUT)
    assert after(stopped, stop_reason="timeout: x", on=["timeout"]).state is JobState.QUEUED


def test_a_preempted_job_goes_back_to_the_queue_and_loses_no_retry() -> None:
    stopped = Outcome(state=JobState.STOPPED, cause=Cause.STOPPED, message="")
    verdict = after(stopped, stop_reason="preempted: for b", max_retries=0)
    assert verdict.state is JobState.QUEUED
    assert not verdict.counts


def test_time_outs_count_from_the_start_and_deadlines_from_the_submission() -> None:
    asked = request(timeout_s=10, deadline_s=100)
    assert policy.overdue(asked, 0.0, 50.0, 59.0) == ""
    assert policy.overdue(asked, 0.0, 50.0, 61.0).startswith("timeout: ")
    assert policy.overdue(asked, 0.0, 95.0, 101.0).startswith("deadline: ")
    assert policy.overdue(asked, 0.0, None, 99.0) == ""


def test_a_cluster_that_went_before_it_got_the_job_costs_no_retry_and_no_pause() -> None:
    asked = request(retry={"max_retries": 0})
    gone = failed(Cause.HEAD_GONE)
    verdict = policy.after(asked, gone, num_failures=0, stop_reason="", now=100.0, ran=False)
    assert (verdict.state, verdict.counts, verdict.not_before) == (JobState.QUEUED, False, 100.0)
    stopped = policy.after(asked, gone, num_failures=0, stop_reason="by ann", now=1.0, ran=False)
    assert stopped.state is JobState.STOPPED
