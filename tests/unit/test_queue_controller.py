"""The controller against a job API that misbehaves: what runs, how often, and what is written."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from fake_ray import FakeRay
from queue_site import Site
from queue_state import request

from manta.cluster import record
from manta.jobs import cron, lease, logs, queries, store
from manta.jobs.controller import Options
from manta.jobs.model import Cause, JobState


def test_a_job_runs_and_its_log_is_kept(site: Site) -> None:
    site.submit("a")
    site.start()
    site.runs("a")
    site.until_state("a", JobState.RUNNING)
    site.ray.end("a")
    site.until_state("a", JobState.SUCCEEDED)
    log = b"".join(logs.read(logs.folder(site.storage_url, "a", 1)))
    assert log == b"log of a\n"


@pytest.mark.parametrize("how", ["drop", "cut", "lose"])
def test_a_submission_whose_outcome_is_unknown_runs_once(site: Site, how: str) -> None:
    site.ray.misbehave = [how]
    site.submit("a")
    site.start()
    site.runs("a")
    site.until_state("a", JobState.RUNNING)
    site.ray.end("a")
    site.until_state("a", JobState.SUCCEEDED)
    assert list(site.ray.jobs) == ["a"]
    assert site.ray.posts["a"] == (2 if how == "lose" else 1)
    assert len(queries.attempts_of(site.state, "a")) == 1


def test_a_controller_that_ends_between_writing_and_asking_is_made_up_for(site: Site) -> None:
    site.submit("a")
    held = lease.acquire(site.state)
    assert held is not None
    job = site.job("a")
    store.begin_attempt(site.state, held, job, cluster="local", cluster_id="c1")
    held.release(site.state)  # it died here
    site.start()
    site.runs("a")
    site.ray.end("a")
    site.until_state("a", JobState.SUCCEEDED)
    assert site.ray.posts["a"] == 1


def test_a_job_that_ended_while_no_controller_lived_is_found_ended(site: Site) -> None:
    site.submit("a")
    site.start()
    site.until_state("a", JobState.RUNNING)
    site.stop()
    site.ray.end("a", "FAILED", message="ValueError", error_type="JOB_ENTRYPOINT_COMMAND_ERROR")
    site.start()
    assert site.until_state("a", JobState.FAILED).cause is Cause.USER_ERROR
    assert site.ray.posts["a"] == 1


def test_no_agent_is_retried_under_the_next_name(site: Site) -> None:
    site.ray.misbehave = ["no agent"]
    site.submit("a")
    site.start()
    site.runs("a-attempt-2")
    causes = [attempt.cause for attempt in queries.attempts_of(site.state, "a")]
    assert causes == [Cause.NO_AGENT, Cause.NONE]


def test_a_head_that_forgot_a_running_job_has_it_run_again(site: Site) -> None:
    site.submit("a")
    site.start()
    site.until_state("a", JobState.RUNNING)
    site.ray.jobs.clear()
    site.runs("a-attempt-2")
    assert queries.attempts_of(site.state, "a")[0].cause is Cause.HEAD_GONE


def test_a_silent_cluster_is_waited_for_and_nothing_runs_twice(site: Site) -> None:
    site.submit("a")
    site.start()
    site.until_state("a", JobState.RUNNING)
    answer, site.ray.get = site.ray.get, lambda request: request.connection.close()  # type: ignore[method-assign]
    time.sleep(1.5)
    assert site.job("a").state is JobState.RUNNING
    site.ray.get = answer  # type: ignore[method-assign]
    site.ray.end("a")
    site.until_state("a", JobState.SUCCEEDED)
    assert list(site.ray.jobs) == ["a"]


def test_a_submission_that_lands_after_it_was_given_up_is_ended(site: Site) -> None:
    site.ray.misbehave = ["no agent"]
    site.submit("a")
    site.start()
    site.runs("a-attempt-2")
    site.until_state("a", JobState.RUNNING)
    late = dict(site.ray.jobs["a-attempt-2"])
    site.ray.start("a", late)  # the first, after all
    site.until(lambda: "a" in site.ray.stopped, "the stray is stopped")
    assert site.ray.jobs["a-attempt-2"]["status"] == "RUNNING"


def test_jobs_of_another_state_on_the_same_cluster_are_only_watched(site: Site) -> None:
    others = {"entrypoint": "x", "metadata": {"manta_job": "o", "manta_digest": "d"}}
    site.ray.start("theirs", others)
    site.ray.start("plain", {"entrypoint": "y"})
    site.start()
    for job_id in ("theirs", "plain"):
        site.until(lambda j=job_id: queries.find(site.state, j), f"{job_id} is seen")
        assert site.until_state(job_id, JobState.RUNNING).origin == "ray"
    time.sleep(0.5)
    assert site.ray.stopped == []


def test_stopping_reaches_a_running_job_once_the_controller_is_back(site: Site) -> None:
    site.submit("a")
    site.start()
    site.until_state("a", JobState.RUNNING)
    site.stop()
    store.ask_stop(site.state, "a", "ann", "stopped by ann")
    site.start()
    job = site.until_state("a", JobState.STOPPED)
    assert (job.cause, job.message) == (Cause.STOPPED, "stopped by ann")
    assert site.ray.stopped == ["a"]


def test_a_cluster_that_is_replaced_has_its_jobs_run_again_on_the_new_one(
    site: Site, tmp_path: Path
) -> None:
    site.submit("a")
    site.start()
    site.until_state("a", JobState.RUNNING)
    site.ray.close()
    record.forget("local")
    site.until(lambda: site.job("a").state is JobState.QUEUED, "the loss is seen")
    site.ray = FakeRay(tmp_path / "new", cluster_id="c2")
    site.runs("a-attempt-2")
    assert [a.cluster_id for a in queries.attempts_of(site.state, "a")] == ["c1", "c2"]


def test_a_job_goes_to_its_next_cluster_when_its_own_is_gone(site: Site, tmp_path: Path) -> None:
    other = FakeRay(tmp_path / "other", cluster_id="o1", name="other")
    site.submit("a", clusters=("local", "other"))
    site.start()
    site.until_state("a", JobState.RUNNING)
    site.ray.close()
    record.forget("local")
    site.until(lambda: "a-attempt-2" in other.jobs, "it runs on the other")
    kinds = [event.kind for event in queries.events_of(site.state, job_id="a")]
    assert "moved" in kinds
    other.close()


def test_no_more_jobs_run_at_a_time_than_there_are_places(site: Site) -> None:
    site.options = Options(max_running=2)
    for number in range(5):
        site.submit(f"j{number}")
    site.start()
    for number in range(5):
        site.runs(f"j{number}")
        time.sleep(0.1)
        running = [j for j in site.ray.jobs.values() if j["status"] == "RUNNING"]
        assert len(running) <= 2
        site.ray.end(f"j{number}")
    site.until_state("j4", JobState.SUCCEEDED)


def test_a_job_of_a_higher_band_takes_the_place_of_a_lower_one(site: Site) -> None:
    site.options = Options(max_running=1, preempt=True)
    site.submit("low", priority=-10)
    site.start()
    site.until_state("low", JobState.RUNNING)
    site.submit("high", priority=10)
    site.runs("high")
    assert site.ray.stopped == ["low"]
    assert site.job("low").state is JobState.QUEUED
    assert site.job("low").num_failures == 0
    site.ray.end("high")
    site.runs("low-attempt-2")


def test_what_comes_again_is_submitted_by_the_controller_which_stays_for_it(site: Site) -> None:
    site.options = Options(idle_stop_s=2.0)
    asked = request("often", storage_url=site.storage_url)
    often = {"name": "often", "line": "* * * * *", "timezone": "UTC", "actor": "test"}
    entry = cron.Entry(**often, request=asked, checked_at=time.time() - 120, last_id="")
    cron.put(site.state, entry)
    site.start()
    site.until(lambda: site.ray.jobs, "it is submitted")
    (job,) = queries.listed(site.state)
    assert job.id == entry.job_id(entry.due(job.submitted_at))
    site.ray.end(next(iter(site.ray.jobs)))
    site.until_state(job.id, JobState.SUCCEEDED)
    time.sleep(3)  # longer than an idle one stays
    assert site._thread is not None
    assert site._thread.is_alive(), "it ended, and nobody would submit the next one"


@pytest.mark.parametrize("ahead_s", [3600.0, -3600.0])
def test_a_step_of_the_clock_times_no_running_job_out(
    site: Site, monkeypatch: pytest.MonkeyPatch, ahead_s: float
) -> None:
    site.submit("a", timeout_s=600, deadline_s=900)
    site.start()
    site.until_state("a", JobState.RUNNING)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + ahead_s)
    site.submit("b", timeout_s=0.5)
    site.until_state("b", JobState.FAILED)
    assert site.job("b").cause is Cause.TIMEOUT, "who is overdue still is seen"
    assert site.job("a").state is JobState.RUNNING
    assert not site.job("a").stop_reason


@pytest.mark.parametrize("ahead_s", [3600.0, -3600.0])
def test_a_cluster_with_another_clock_times_no_job_out(site: Site, ahead_s: float) -> None:
    site.ray.ahead_s = ahead_s
    site.submit("a", timeout_s=600)
    site.submit("b", timeout_s=0.5)
    site.start()
    assert site.until_state("b", JobState.FAILED).cause is Cause.TIMEOUT
    assert not site.until_state("a", JobState.RUNNING).stop_reason


def test_a_clock_put_back_while_no_controller_looked_times_out_all_the_same(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.submit("a", timeout_s=2, deadline_s=900)
    site.start()
    site.until_state("a", JobState.RUNNING)
    site.stop()
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() - 3600)
    site.start()
    assert site.until_state("a", JobState.FAILED).cause is Cause.TIMEOUT
