"""Pipelines walked by the controller: what begins when, what is passed on, what failures leave."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from queue_site import Site
from queue_state import request

from manta.errors import InputError, MantaError
from manta.jobs import cron, lease, queries, runs, store, unchanged
from manta.jobs.controller import Options
from manta.jobs.model import JobState
from manta.jobs.resume import resume
from manta.jobs.run_request import RunRequest, ServeFile, StepRequest, filled, report_url
from manta.jobs.runs import Run, RunStep


class Runs:
    """Runs of pipelines at a site."""

    def __init__(self, site: Site) -> None:
        self.site = site

    def asked(self, steps: dict[str, Any], run_id: str = "r", **changes: Any) -> RunRequest:
        """A run; `steps` has name → needs, (needs, changes of its job), or a Serve config."""
        return RunRequest.model_validate(
            {
                "id": run_id,
                "pipeline": "p",
                "cluster": "local",
                "storage_url": self.site.storage_url,
                "steps": [self._step(run_id, name, told) for name, told in steps.items()],
            }
            | changes
        )

    def submit(self, steps: dict[str, Any], **changes: Any) -> None:
        runs.submit(self.site.state, self.asked(steps, **changes), "ann")

    def get(self, run_id: str = "r") -> Run:
        return runs.get(self.site.state, run_id)

    def step(self, name: str) -> RunStep:
        return next(step for step in self.get().steps if step.name == name)

    def until(self, state: str, run_id: str = "r") -> Run:
        self.site.until(lambda: self.get(run_id).state == state, f"{state}: {self.get(run_id)}")
        return self.get(run_id)

    def until_step(self, name: str, state: str) -> RunStep:
        self.site.until(lambda: self.step(name).state == state, f"{name} {state}: {self.get()}")
        return self.step(name)

    def report(self, step: str, **artifacts: str) -> None:
        """What a step's job writes when it has made something."""
        file = Path(report_url(self.site.storage_url, "r", step))
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"artifacts": artifacts}))

    def _step(self, run_id: str, name: str, told: Any) -> StepRequest:
        if isinstance(told, ServeFile):
            return StepRequest(name=name, deploy=told)
        needs, changes = told if isinstance(told, tuple) and told else (told or (), {})
        needs = (needs,) if isinstance(needs, str) else tuple(needs)
        values = {"storage_url": self.site.storage_url, "retry": {"max_retries": 0}}
        job = request(f"{run_id}-{name}", **(values | changes))
        url = report_url(self.site.storage_url, run_id, name)
        return StepRequest(name=name, needs=needs, job=job, report_url=url)


@pytest.fixture
def pipeline(site: Site) -> Runs:
    return Runs(site)


def test_steps_run_side_by_side_and_each_after_what_it_needs(pipeline: Runs) -> None:
    site = pipeline.site
    pipeline.submit({"a": (), "b": "a", "c": "a", "d": ["b", "c"]})
    site.start()
    site.runs("r-a")
    assert list(site.ray.jobs) == ["r-a"]
    site.ray.end("r-a")
    site.runs("r-b")
    site.runs("r-c")
    site.ray.end("r-b")
    pipeline.until_step("b", "SUCCEEDED")
    assert "r-d" not in site.ray.jobs
    site.ray.end("r-c")
    site.runs("r-d")
    site.ray.end("r-d")
    run = pipeline.until("SUCCEEDED")
    assert run.ended_at is not None
    assert set(site.ray.posts.values()) == {1}


def test_a_failure_stops_what_needs_it_and_a_retry_of_the_run_repeats_nothing(
    pipeline: Runs,
) -> None:
    site = pipeline.site
    pipeline.submit({"a": (), "b": (), "after-a": "a", "after-b": "b"})
    site.start()
    site.runs("r-a")
    site.runs("r-b")
    site.ray.end("r-a", "FAILED", driver_exit_code=1, message="boom")
    site.ray.end("r-b")
    site.runs("r-after-b")
    site.ray.end("r-after-b")
    run = pipeline.until("FAILED")
    assert [step.state for step in run.steps] == ["FAILED", "SUCCEEDED", "", "SUCCEEDED"]
    assert "boom" in run.steps[0].message
    resume(site.state, "r", "ann")
    site.runs("r-a-attempt-2")
    site.ray.end("r-a-attempt-2")
    site.runs("r-after-a")
    site.ray.end("r-after-a")
    pipeline.until("SUCCEEDED")
    assert set(site.ray.posts.values()) == {1}


def test_retrying_the_job_of_a_step_lets_its_run_go_on(pipeline: Runs) -> None:
    site = pipeline.site
    pipeline.submit({"a": (), "b": "a"})
    site.start()
    site.runs("r-a")
    site.ray.end("r-a", "FAILED", driver_exit_code=1)
    pipeline.until("FAILED")
    store.retry(site.state, "r-a", "ann")
    site.runs("r-a-attempt-2")
    site.ray.end("r-a-attempt-2")
    site.runs("r-b")


def test_a_run_goes_on_under_the_next_controller(pipeline: Runs) -> None:
    site = pipeline.site
    pipeline.submit({"a": (), "b": "a"})
    site.start()
    site.runs("r-a")
    site.stop()
    site.ray.end("r-a")
    site.start()
    site.runs("r-b")
    site.ray.end("r-b")
    pipeline.until("SUCCEEDED")
    assert set(site.ray.posts.values()) == {1}


def test_the_same_run_is_accepted_once(pipeline: Runs) -> None:
    state = pipeline.site.state
    assert runs.submit(state, pipeline.asked({"a": ()}), "ann")
    assert not runs.submit(state, pipeline.asked({"a": ()}), "ann")
    with pytest.raises(InputError, match="is of pipeline p"):
        runs.submit(state, pipeline.asked({"a": ()}, pipeline="other"), "ann")


def test_a_step_that_was_changed_runs_anew_and_what_succeeded_is_kept(pipeline: Runs) -> None:
    site = pipeline.site
    pipeline.submit({"a": (), "b": "a"})
    site.start()
    site.runs("r-a")
    site.ray.end("r-a")
    site.runs("r-b")
    site.ray.end("r-b", "FAILED", driver_exit_code=1)
    pipeline.until("FAILED")
    mended = {"a": ((), {"entrypoint": "other"}), "b": ("a", {"entrypoint": "mended"}), "c": "b"}
    resume(site.state, "r", "ann", pipeline.asked(mended))
    site.runs("r-b-v2")
    site.ray.end("r-b-v2", "FAILED", driver_exit_code=1)
    pipeline.until("FAILED")
    resume(site.state, "r", "ann", pipeline.asked(mended))  # the same again: a retry
    site.runs("r-b-v2-attempt-2")
    site.ray.end("r-b-v2-attempt-2")
    site.runs("r-c")
    assert site.ray.jobs["r-b-v2"]["entrypoint"] == "mended"
    assert site.ray.posts["r-a"] == 1


def test_a_run_is_not_resumed_on_another_cluster_or_as_another_pipeline(pipeline: Runs) -> None:
    pipeline.submit({"a": ()})
    state = pipeline.site.state
    with pytest.raises(InputError, match="give --cluster local"):
        resume(state, "r", "ann", pipeline.asked({"a": ()}, cluster="else"))
    with pytest.raises(InputError, match="is of pipeline p, not q"):
        resume(state, "r", "ann", pipeline.asked({"a": ()}, pipeline="q"))


def test_what_a_step_made_is_passed_on(pipeline: Runs) -> None:
    site = pipeline.site
    uses = {
        "entrypoint": "python x.py --data ${{ needs.a.outputs.data }}",
        "runtime_env_passthrough": {"env_vars": {"DATA": "${{needs.a.outputs.data}}"}},
    }
    pipeline.submit({"a": (), "b": ("a", uses)})
    pipeline.report("a", data="/nowhere/a table")
    site.start()
    site.runs("r-a")
    site.ray.end("r-a")
    site.runs("r-b")
    assert site.ray.jobs["r-b"]["entrypoint"] == "python x.py --data '/nowhere/a table'"
    asked = queries.request_of(site.state, "r-b").runtime_env_passthrough
    assert asked["env_vars"]["DATA"] == "/nowhere/a table"
    assert pipeline.step("a").artifacts == {"data": "/nowhere/a table"}


def test_a_step_that_names_what_was_not_made_fails_and_says_what_was(pipeline: Runs) -> None:
    uses = {"entrypoint": "x ${{ needs.a.outputs.modle }}"}
    pipeline.submit({"a": (), "b": ("a", uses)})
    pipeline.report("a", model="/m", scores="/s")
    pipeline.site.start()
    pipeline.site.runs("r-a")
    pipeline.site.ray.end("r-a")
    step = pipeline.until("FAILED").steps[1]
    assert step.message == "step a has made no `modle`; it made: model, scores"
    assert "r-b" not in pipeline.site.ray.jobs


def test_a_value_that_was_made_is_one_word_of_the_command_whatever_it_is() -> None:
    job = request("b", entrypoint="x ${{ needs.a.outputs.out }}")
    assert filled(job, {"a": {"out": "; rm -rf /"}}).entrypoint == "x '; rm -rf /'"


def test_a_report_without_artifacts_fails_its_step_in_one_line(pipeline: Runs) -> None:
    pipeline.submit({"a": ()})
    file = Path(report_url(pipeline.site.storage_url, "r", "a"))
    file.parent.mkdir(parents=True)
    file.write_text('["not what it should be"]')
    pipeline.site.start()
    pipeline.site.runs("r-a")
    pipeline.site.ray.end("r-a")
    assert "has no `artifacts`" in pipeline.until("FAILED").steps[0].message


def test_steps_that_are_unchanged_are_taken_from_an_earlier_run(
    pipeline: Runs, tmp_path: Path
) -> None:
    site, made = pipeline.site, tmp_path / "made"
    made.write_text("data")
    pipeline.submit({"a": (), "b": "a"})
    pipeline.report("a", data=str(made))
    site.start()
    for job in ("r-a", "r-b"):
        site.runs(job)
        site.ray.end(job)
    pipeline.until("SUCCEEDED")
    pipeline.submit({"a": (), "b": "a"}, run_id="again", skip_unchanged=True)
    site.runs("again-b")  # which reported nothing
    first = pipeline.get("again").steps[0]
    assert (first.state, first.message, first.job_id) == ("SUCCEEDED", "unchanged", "r-a")
    assert first.artifacts == {"data": str(made)}
    made.write_text("other")
    pipeline.submit({"a": (), "b": "a"}, run_id="third", skip_unchanged=True)
    site.runs("third-a")


def _deployer(answers: list[str | MantaError], asked: list[tuple[str, ...]]) -> Callable[..., str]:
    def deploy(cluster: str, name: str, text: str, say: Callable[[str], None]) -> str:
        asked.append((cluster, name, text))
        say("llm deploying")
        answer = answers.pop(0)
        if isinstance(answer, MantaError):
            raise answer
        return answer

    return deploy


def test_a_deploy_is_a_step_that_the_controller_does_and_does_again(pipeline: Runs) -> None:
    asked: list[tuple[str, ...]] = []
    answers = [MantaError("not healthy"), "http://127.0.0.1:8000"]
    pipeline.site.options = Options(deploy=_deployer(answers, asked))
    pipeline.submit({"serve": ServeFile(name="llm.yaml", text="applications: []")})
    pipeline.site.start()
    assert pipeline.until("FAILED").steps[0].message == "not healthy"
    resume(pipeline.site.state, "r", "ann")
    run = pipeline.until("SUCCEEDED")
    assert run.steps[0].artifacts == {"endpoint": "http://127.0.0.1:8000"}
    assert asked == [("local", "llm.yaml", "applications: []")] * 2


def test_stopping_a_run_stops_its_jobs_and_begins_nothing_more(pipeline: Runs) -> None:
    site = pipeline.site
    pipeline.submit({"a": (), "b": (), "c": "a"})
    site.start()
    for job in ("r-a", "r-b"):
        site.until(lambda j=job: queries.find(site.state, j), f"{job} is submitted")
        site.until_state(job, JobState.RUNNING)
    assert runs.stop(site.state, "r", "ann", "enough").state == "STOPPED"
    for job in ("r-a", "r-b"):
        site.until_state(job, JobState.STOPPED)
    time.sleep(0.5)
    assert "r-c" not in site.ray.jobs
    resume(site.state, "r", "ann")
    for job in ("r-a-attempt-2", "r-b-attempt-2"):
        site.runs(job)
        site.ray.end(job)
    site.runs("r-c")
    site.ray.end("r-c")
    pipeline.until("SUCCEEDED")


def test_a_run_that_was_stopped_as_its_step_began_submits_nothing(pipeline: Runs) -> None:
    site = pipeline.site
    pipeline.submit({"a": ()})
    held = lease.acquire(site.state)
    assert held is not None
    run, job = pipeline.get(), runs.request_of(site.state, "r", "a").job
    runs.stop(site.state, "r", "ann", "enough")
    runs.begin_step(site.state, held, run, run.steps[0], job, "mark")
    assert queries.find(site.state, "r-a") is None
    assert pipeline.step("a").state == runs.WAITING


def test_an_id_that_is_anothers_fails_the_step_and_not_the_controller(pipeline: Runs) -> None:
    pipeline.site.submit("r-a", entrypoint="anything else")
    pipeline.submit({"a": ()})
    pipeline.submit({"a": ()}, run_id="other")
    pipeline.site.start()
    assert "belongs to `anything else`" in pipeline.until("FAILED").steps[0].message
    pipeline.site.runs("other-a")


def test_a_pipeline_comes_again_with_jobs_and_reports_of_its_own(pipeline: Runs) -> None:
    site = pipeline.site
    asked = pipeline.asked({"a": (), "b": "a"}, run_id="nightly")
    told = {"name": "nightly", "line": "* * * * *", "timezone": "UTC", "actor": "ann"}
    entry = cron.Entry(**told, request=asked, checked_at=time.time() - 120, last_id="")
    cron.put(site.state, entry)
    assert cron.load(site.state)[0].request == asked
    site.start()
    site.until(lambda: runs.listed(site.state, 5), "a run begins")
    run = runs.listed(site.state, 5)[0]
    assert run.id == entry.job_id(entry.due(run.started_at))
    site.runs(f"{run.id}-a")
    variables = queries.request_of(site.state, f"{run.id}-a").runtime_env_passthrough["env_vars"]
    assert variables["MANTA_REPORT"].endswith(f"{run.id}/a.json")
    cron.put(site.state, cron.Entry(**vars(entry) | {"last_id": run.id}))
    due = [event for event in queries.events_of(site.state) if event.kind == "cron skipped"]
    site.until(
        lambda: (
            due
            or [e for e in queries.events_of(site.state) if e.kind == "cron skipped"]
            or entry.due(time.time()) == entry.due(run.started_at)
        ),
        "a time whose predecessor runs is left out",
    )


def test_a_name_that_makes_a_steps_job_too_long_is_refused(pipeline: Runs) -> None:
    asked = pipeline.asked({"s" * 63: ()})
    told = {"name": "n" * 60, "line": "* * * * *", "timezone": "UTC", "actor": "ann"}
    with pytest.raises(InputError, match="cannot be a job's id"):
        cron.put(
            pipeline.site.state, cron.Entry(**told, request=asked, checked_at=0.0, last_id="")
        )


# -- What a review found --


def _fail(site: Site, job: str) -> None:
    site.runs(job)
    site.ray.end(job, "FAILED", driver_exit_code=1)


def test_a_changed_step_never_takes_the_job_of_another_step(pipeline: Runs) -> None:
    site = pipeline.site
    pipeline.submit({"t-v1": (), "t-v2": ()})
    site.start()
    _fail(site, "r-t-v1")
    site.runs("r-t-v2")
    site.ray.end("r-t-v2")
    pipeline.until("FAILED")
    mended = {"t-v1": ((), {"entrypoint": "mended"}), "t-v2": ()}
    resume(site.state, "r", "ann", pipeline.asked(mended))
    site.runs("r-t-v3")
    assert site.ray.jobs["r-t-v3"]["entrypoint"] == "mended"


def test_a_job_of_that_id_that_the_step_did_not_begin_is_never_taken_for_its_own(
    pipeline: Runs,
) -> None:
    site = pipeline.site
    site.submit("r-a", entrypoint="anything else")
    pipeline.submit({"a": ()})
    site.start()
    site.runs("r-a")
    site.ray.end("r-a")
    pipeline.until("FAILED")
    resume(site.state, "r", "ann")
    assert "belongs to `anything else`" in pipeline.until("FAILED").steps[0].message


def test_a_resumed_step_waits_for_what_it_needs_now(pipeline: Runs) -> None:
    site = pipeline.site
    pipeline.submit({"b": ()})
    site.start()
    _fail(site, "r-b")
    pipeline.until("FAILED")
    resume(site.state, "r", "ann", pipeline.asked({"prep": (), "b": "prep"}))
    site.runs("r-prep")
    time.sleep(0.5)
    assert list(site.ray.jobs) == ["r-b", "r-prep"]
    site.ray.end("r-prep")
    site.runs("r-b-v2")


def test_what_was_found_for_a_step_that_has_been_replaced_is_dropped(pipeline: Runs) -> None:
    state = pipeline.site.state
    pipeline.submit({"a": ()})
    held, run = lease.acquire(state), pipeline.get()
    assert held is not None
    old = runs.request_of(state, "r", "a").job
    runs.stop(state, "r", "ann", "enough")
    resume(state, "r", "ann", pipeline.asked({"a": ((), {"entrypoint": "new"})}))
    runs.begin_step(state, held, run, run.steps[0], old, "mark")
    runs.settle_step(state, held, run, run.steps[0], JobState.SUCCEEDED)
    assert queries.find(state, "r-a") is None
    assert pipeline.step("a").state == runs.WAITING


def test_a_deploy_that_was_stopped_is_done_with_the_file_as_it_is_then(pipeline: Runs) -> None:
    site, asked = pipeline.site, list[str]()
    gate = threading.Event()

    def deploy(cluster: str, name: str, text: str, say: Callable[[str], None]) -> str:
        asked.append(text)
        gate.wait(20)
        return "http://there"

    site.options = Options(deploy=deploy)
    pipeline.submit({"serve": ServeFile(name="x.yaml", text="old")})
    site.start()
    site.until(lambda: asked, "the deploy begins")
    assert runs.stop(site.state, "r", "ann", "enough").steps[0].state == "STOPPED"
    resume(site.state, "r", "ann", pipeline.asked({"serve": ServeFile(name="x.yaml", text="new")}))
    gate.set()
    pipeline.until("SUCCEEDED")
    assert asked == ["old", "new"]


def test_a_cron_line_whose_id_is_anothers_is_left_out_and_the_controller_lives(
    pipeline: Runs,
) -> None:
    site = pipeline.site
    told = {"name": "n", "line": "* * * * *", "timezone": "UTC", "actor": "ann", "last_id": ""}
    entry = cron.Entry(**told, request=request("n"), checked_at=time.time() - 120)
    for due in (entry.due(time.time()), entry.next(time.time())):
        site.submit(entry.job_id(due), entrypoint="mine")
    cron.put(site.state, entry)
    site.start()

    def skipped() -> list[str]:
        return [e.text for e in queries.events_of(site.state) if e.kind == "cron skipped"]

    site.until(skipped, "it is said")
    assert "belongs to `mine`" in skipped()[0]
    site.submit("later")
    site.runs("later")


def test_a_step_whose_report_was_wrong_can_be_mended(pipeline: Runs) -> None:
    site = pipeline.site
    pipeline.submit({"a": ()})
    file = Path(report_url(site.storage_url, "r", "a"))
    file.parent.mkdir(parents=True)
    file.write_text("[]")
    site.start()
    site.runs("r-a")
    site.ray.end("r-a")
    pipeline.until("FAILED")
    resume(site.state, "r", "ann", pipeline.asked({"a": ((), {"entrypoint": "mended"})}))
    site.runs("r-a-v2")
    file.unlink()
    site.ray.end("r-a-v2")
    pipeline.until("SUCCEEDED")


def test_a_retry_that_comes_as_the_step_is_being_settled_is_not_lost(pipeline: Runs) -> None:
    site = pipeline.site
    pipeline.submit({"a": ()})
    site.start()
    _fail(site, "r-a")
    site.until_state("r-a", JobState.FAILED)
    site.stop()
    held, run = lease.acquire(site.state), pipeline.get()
    assert held is not None
    store.retry(site.state, "r-a", "ann")
    runs.settle_step(site.state, held, run, run.steps[0], JobState.FAILED)  # decided before
    runs.end(site.state, held, "r")
    told = pipeline.get()
    assert told.state == "RUNNING"
    assert not told.steps[0].settled


def test_what_cannot_be_seen_is_not_taken_for_unchanged(tmp_path: Path) -> None:
    root = str(tmp_path)
    unchanged.remember("m", "a", {"table": str(tmp_path / "nowhere")}, root)
    assert unchanged.find("m", root) is None


def test_a_run_is_not_resumed_while_a_job_of_it_is_still_being_stopped(pipeline: Runs) -> None:
    site = pipeline.site
    pipeline.submit({"a": ()})
    site.start()
    site.until(lambda: queries.find(site.state, "r-a"), "it is submitted")
    site.until_state("r-a", JobState.RUNNING)
    site.stop()  # so that nobody ends the job
    runs.stop(site.state, "r", "ann", "enough")
    with pytest.raises(InputError, match="r-a is still being stopped"):
        resume(site.state, "r", "ann")


def test_a_run_of_many_steps_goes_on_in_turns_with_all_else(pipeline: Runs) -> None:
    site = pipeline.site
    site.options = Options(max_running=200)
    pipeline.submit({f"s{number}": () for number in range(120)})
    site.start()
    site.until(lambda: len(site.ray.jobs) == 120, "all begin")
    for job in list(site.ray.jobs):
        site.ray.end(job)
    pipeline.until("SUCCEEDED")
