"""Budgets: a warning at 80 %, nothing new at 100 %, running jobs stopped if it is set so."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from fake_ray import FakeRay
from fastapi.testclient import TestClient
from queue_state import request

import manta
from manta import state as states
from manta.cli import budget as budget_command
from manta.cli import jobs as jobs_command
from manta.cli import usage as usage_command
from manta.cli.main import _exit_code
from manta.cluster import record
from manta.errors import InputError
from manta.jobs import (
    access,
    accounts,
    budgets,
    http_api,
    metering,
    own_budget,
    passes,
    queries,
    shares,
    spending,
    store,
    watch,
)
from manta.jobs import lease as leases
from manta.jobs import request as asking
from manta.jobs.access import Role
from manta.jobs.budgets import BELOW, REACHED, WARNED, Budget
from manta.jobs.controller import Controller, Options
from manta.jobs.lease import Lease, LeaseLost
from manta.jobs.model import Cause, Job, JobState
from manta.plan.clusters import read_cluster
from manta.plan.demand import parse_demand
from manta.plan.jobs import plan_job
from manta.plan.nodes import plan_cluster
from manta.spec import JobSpec, Resources
from manta.spec.catalog import load_catalog
from manta.state import State

ONE_CPU = '[["CPU", 1.0]]'
PRICES = (
    "cloud: onprem\nupdated: 2026-11-01\npue: {{value: 1.5, source: meter}}\n"
    "regions: {{site: {{grid_gco2e_per_kwh: 300, source: bill}}}}\n"
    "instance_types:\n  local: {{num_cpus: 4, memory_gib: 32, idle_watts: 100, full_watts: 400,\n"
    "    power_source: meter, owned: {{capital_usd: {capital:g}, lifetime_years: 1}}}}\n"
)


def spend(state: State, lease: Lease, usd: float, *, team: str = "ml", age_s: float = 0.0) -> None:
    """A job of the team that had a whole cluster, which cost so much, `age_s` ago."""
    name = f"j{time.monotonic_ns()}"
    start = states.now() - age_s - 2
    job, _ = store.submit(state, request(name, team=team, shape=ONE_CPU), "ann")
    job, attempt = store.begin_attempt(state, lease, job, cluster="local", cluster_id=name)
    store.mark_running(state, lease, job, attempt, at=start, node_id="n")
    with state.write() as connection:
        row: dict[str, Any] = dict.fromkeys(states.nodes.c.keys(), "")
        row |= dict.fromkeys(["idle_watts", "full_watts", "pue", "grid_gco2e_per_kwh"])
        row |= {"cluster_id": name, "node_id": "n", "resources": '{"CPU": 1, "slot": 16}'}
        row |= {"opened_at": start, "seen_at": start + 1, "closed_at": start + 1, "unseen_s": 0}
        connection.execute(states.nodes.insert().values(**row | {"usd_per_hour": usd * 3600}))


def kinds(state: State) -> list[str]:
    return [e.kind for e in queries.events_of(state) if e.kind.startswith("budget")]


def level(state: State) -> int:
    return budgets.load(state)[0].level_at(states.now())


def test_a_budget_warns_once_at_80_percent_and_is_reached_at_100(
    state: State, lease: Lease
) -> None:
    budgets.put(state, "ml", 100, "total", "hold", "ann@here")
    spend(state, lease, 79)
    budgets.count(state, lease)
    assert (level(state), kinds(state)) == (BELOW, ["budget set"])
    spend(state, lease, 2)
    for _ in range(3):
        budgets.count(state, lease)
    assert (level(state), kinds(state)) == (WARNED, ["budget set", "budget warning"])
    assert shares.load(state).held == {}
    spend(state, lease, 20)
    for _ in range(3):
        budgets.count(state, lease)
    assert kinds(state)[2:] == ["budget reached"]
    words = "team ml has reached its budget: 101.00 of 100.00 USD in all"
    assert shares.load(state).held == {"ml": words}


def test_other_teams_and_earlier_periods_do_not_count(state: State, lease: Lease) -> None:
    budgets.put(state, "ml", 10, "month", "hold", "ann")
    spend(state, lease, 50, team="other")
    spend(state, lease, 50, age_s=40 * 86_400)
    budgets.count(state, lease)
    assert (level(state), kinds(state)) == (BELOW, ["budget set"])


def test_setting_a_budget_counts_at_once_what_was_spent_and_raising_it_lets_jobs_start(
    state: State, lease: Lease
) -> None:
    spend(state, lease, 60)
    budgets.put(state, "ml", 50, "total", "hold", "ann")
    assert set(shares.load(state).held) == {"ml"}
    budgets.put(state, "ml", 70, "total", "hold", "ann")
    assert shares.load(state).held == {}
    assert kinds(state) == ["budget set", "budget reached", "budget set", "budget warning"]
    budgets.remove(state, "ml", "ann")
    budgets.remove(state, "ml", "ann")
    assert kinds(state)[4:] == ["budget removed"]


def test_a_new_period_lifts_the_hold_with_an_event(state: State, lease: Lease) -> None:
    before = Budget(team="ml", usd=10, per="month", period="2026-01", level=REACHED, spent_usd=12)
    with state.write() as connection:
        connection.execute(states.budgets.insert().values(**vars(before)))
    assert shares.load(state).held == {}
    assert budgets.count(state, lease)[0].level == BELOW
    assert kinds(state) == ["budget released"]


def test_who_has_lost_the_lease_changes_no_budget(state: State, lease: Lease) -> None:
    budgets.put(state, "ml", 1, "total", "hold", "ann")
    spend(state, lease, 5)
    lease.release(state)
    assert leases.acquire(state) is not None
    with pytest.raises(LeaseLost):
        budgets.count(state, lease)
    assert (level(state), kinds(state)) == (BELOW, ["budget set"])


@pytest.mark.parametrize("usd", [0.0, -5.0, float("nan"), float("inf")])
def test_an_amount_that_makes_no_sense_is_refused_and_nothing_changes(
    state: State, usd: float
) -> None:
    with pytest.raises(InputError, match="write an amount above 0"):
        budgets.put(state, "ml", usd, "month", "hold", "ann")
    assert budgets.load(state) == []


@pytest.mark.parametrize(
    ("per", "period", "start"),
    [
        ("day", "2026-11-22", datetime(2026, 11, 22, tzinfo=UTC)),
        ("week", "2026-W47", datetime(2026, 11, 16, tzinfo=UTC)),
        ("month", "2026-11", datetime(2026, 11, 1, tzinfo=UTC)),
        ("total", "total", datetime(1970, 1, 1, tzinfo=UTC)),
    ],
)
def test_periods_begin_in_utc_and_weeks_on_monday(per: Any, period: str, start: datetime) -> None:
    at = datetime(2026, 11, 22, 23, 59, tzinfo=UTC).timestamp()
    assert budgets.period_of(per, at) == period
    assert budgets.start_of(per, at) == start.timestamp()


# -- With the real controller --


class Site:
    """A state, a controller and a cluster of one node whose price a file gives."""

    def __init__(self, tmp_path: Path, state: State, capital_usd: float) -> None:
        self.state, self.ray = state, FakeRay(tmp_path / "cluster")
        self.storage_url = str(tmp_path / "storage")
        folder = tmp_path / "home" / "prices"
        folder.mkdir(parents=True)
        (folder / "own.yaml").write_text(PRICES.format(capital=capital_usd))
        held = leases.acquire(state)
        assert held is not None
        self.controller = Controller(state, held, Options())
        self.thread = threading.Thread(target=self.controller.run)
        self.thread.start()

    def close(self) -> None:
        self.controller.stop()
        self.thread.join(timeout=20)
        assert not self.thread.is_alive()
        self.ray.close()

    def submit(self, job_id: str, **changes: Any) -> None:
        asked = {"storage_url": self.storage_url, "team": "ml", "shape": ONE_CPU}
        store.submit(self.state, request(job_id, **(asked | changes)), "test")

    def until(self, check: Callable[[], Any], what: str) -> None:
        deadline = time.monotonic() + 20
        while not check():
            assert time.monotonic() < deadline, what
            time.sleep(0.02)

    def until_state(self, job_id: str, wanted: JobState) -> Job:
        def there() -> bool:
            job = queries.find(self.state, job_id)  # one of plain Ray is seen a moment later
            return job is not None and job.state is wanted

        self.until(there, f"{job_id} {wanted}")
        return queries.get(self.state, job_id)


USD_PER_S = 1.0


@pytest.fixture
def site(state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """The cluster costs a dollar a second, and is looked at often."""
    monkeypatch.setenv("MANTA_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(metering, "EXTEND_S", 0.1)
    monkeypatch.setattr(accounts, "PERIOD_S", 0.1)
    monkeypatch.setattr(accounts, "COUNT_S", 0.1)
    monkeypatch.setattr(accounts, "MAX_SHARE", 1.0)
    monkeypatch.setattr(watch, "RESOURCES_PERIOD_S", 0.1)
    made = Site(tmp_path, state, USD_PER_S * 3600 * 8760)
    yield made
    made.close()


def test_a_team_at_its_limit_runs_on_and_its_new_jobs_are_held_with_the_reason(
    site: Site, state: State
) -> None:
    budgets.put(state, "ml", 0.25, "month", "hold", "ann")
    site.submit("a")  # a quarter of the CPUs: 0.25 USD a second
    site.until_state("a", JobState.RUNNING)
    site.until(lambda: "budget reached" in kinds(state), "reached")
    assert kinds(state).count("budget warning") <= 1
    site.submit("b")
    site.submit("c", team="other")
    site.until_state("c", JobState.RUNNING)
    assert queries.get(state, "a").state is JobState.RUNNING
    held = queries.get(state, "b")
    assert held.state is JobState.QUEUED
    assert passes.explain(state, held).startswith("team ml has reached its budget: ")
    budgets.put(state, "ml", 1e6, "month", "hold", "ann")
    site.until_state("b", JobState.RUNNING)


def test_with_stop_running_jobs_of_the_team_end_with_the_cause_budget(
    site: Site, state: State
) -> None:
    site.submit("other", team="other")
    site.submit("a")
    site.ray.start("plain", {"entrypoint": "sleep 1"})  # sent by plain `ray job submit`
    site.until_state("a", JobState.RUNNING)
    site.until_state("plain", JobState.RUNNING)
    budgets.put(state, "default", 0.01, "total", "stop", "ann")
    site.until(lambda: "budget reached" in kinds(state), "what plain jobs cost is counted")
    budgets.put(state, "ml", 0.25, "total", "stop", "ann")
    ended = site.until_state("a", JobState.STOPPED)
    assert ended.cause is Cause.BUDGET
    assert "team ml has reached its budget" in ended.message
    assert site.ray.stopped == ["a"]
    assert queries.get(state, "other").state is JobState.RUNNING


def test_a_job_that_has_spent_its_own_budget_is_stopped(site: Site, state: State) -> None:
    site.submit("a", budget_usd=0.3)
    site.submit("b", budget_usd=1e6)
    ended = site.until_state("a", JobState.STOPPED)
    assert (ended.cause, "of its 0.3 USD" in ended.message) == (Cause.BUDGET, True)
    assert queries.get(state, "b").state is JobState.RUNNING
    assert spending.of_job(state, ended).usd >= 0.3


def test_what_jobs_cost_is_shown_with_idle_and_the_bill(
    site: Site, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MANTA_STATE", str(state.engine.url))
    site.submit("a")
    site.until_state("a", JobState.RUNNING)
    site.until(lambda: spending.of_job(state, queries.get(state, "a")).usd > 0.2, "it costs")
    site.ray.end("a")
    site.until_state("a", JobState.SUCCEEDED)
    site.until(lambda: spending.report(state, "job", 0)[""].usd > 0.5, "the cluster costs on")
    parts = spending.report(state, "job", 0)
    assert parts["a"].kwh == pytest.approx(parts["a"].usd / 1.0 / 3600 * 0.4 * 1.5, rel=0.01)
    if not str(state.engine.url).startswith("sqlite"):
        return
    shown = CliRunner().invoke(usage_command.command, ["--by", "job"]).output
    assert [line.split()[0] for line in shown.splitlines()][:4] == [
        "JOB",
        "a",
        "(idle)",
        "(total)",
    ]
    told = json.loads(CliRunner().invoke(usage_command.command, ["--json"]).output)
    whole = told["owners"]["ml"]["usd"] + told["idle"]["usd"]
    assert whole == pytest.approx(told["total"]["usd"])
    story = json.loads(CliRunner().invoke(jobs_command.command, ["show", "a", "--json"]).output)
    assert story["cost"]["usd"] == pytest.approx(parts["a"].usd, rel=0.01)


# -- A job's own budget, before it runs --


@pytest.fixture
def priced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeRay]:
    """A cluster of one node of 4 CPUs that costs 8 USD an hour."""
    monkeypatch.setenv("MANTA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MANTA_STATE", f"sqlite:///{tmp_path}/state.db")
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "home" / "prices"
    folder.mkdir(parents=True)
    (folder / "own.yaml").write_text(PRICES.format(capital=8 * 8760))
    ray = FakeRay(tmp_path / "ray")
    yield ray
    ray.close()


TWO_CPUS = parse_demand('{"CPU": 2}')
TOO_LITTLE = (
    "`budget_usd` 3 is below the price: 4 USD/h on cluster `local` for `timeout_s` 3600 is 4 USD"
)


def test_a_budget_below_the_price_is_refused_and_one_above_it_is_not(priced: FakeRay) -> None:
    own_budget.require_enough(4.1, 3600, TWO_CPUS, {"local"})
    own_budget.require_enough(None, 3600, TWO_CPUS, {"local"})
    own_budget.require_enough(0.1, None, TWO_CPUS, {"local"})
    own_budget.require_enough(0.1, 3600, TWO_CPUS, {"local", "unknown"})
    with pytest.raises(own_budget.OverBudget) as caught:
        own_budget.require_enough(3, 3600, TWO_CPUS, {"local"})
    assert (caught.value.what, caught.value.fix) == (
        TOO_LITTLE,
        "write at least 4, or a timeout_s of 2700",
    )


def test_without_a_known_price_no_budget_is_refused(priced: FakeRay, tmp_path: Path) -> None:
    (tmp_path / "home" / "prices" / "own.yaml").unlink()
    own_budget.require_enough(0.001, 3600, TWO_CPUS, {"local"})


def test_the_command_names_file_and_line_of_a_budget_below_the_price(
    priced: FakeRay,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("manta.jobs.daemon.ensure", lambda *_: None)  # no process beside the test
    Path("job.yaml").write_text(
        "name: train\nentrypoint: 'true'\nresources: {num_cpus: 2}\n"
        "timeout_s: 3600\nbudget_usd: 3\n"
    )
    assert _exit_code(["submit", "job.yaml", "--no-wait"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"job.yaml:5: {TOO_LITTLE}; write at least 4, or a timeout_s of 2700"
    assert _exit_code(["submit", "job.yaml", "--no-wait", "--budget-usd", "2"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("Error: `budget_usd` 2 is below")
    state = states.open_state()
    assert queries.listed(state) == []
    assert queries.events_of(state) == []
    state.close()


def test_on_a_launched_cluster_the_price_is_the_plans_for_the_jobs_share_of_its_nodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MANTA_HOME", str(tmp_path / "home"))
    aws = str(Path(manta.__file__).parents[3] / "cluster" / "aws.yaml")
    ray = FakeRay(tmp_path / "ray")
    access_ = record.Access(head="", user="u", key=None)
    launched = record.Launched(provider="aws", source=aws, config=aws, is_up=True, access=access_)
    gpu = parse_demand('{"GPU": 1}')
    catalog = load_catalog()
    planned = plan_cluster(read_cluster(aws, catalog), gpu, catalog)
    price = own_budget.usd_per_hour(replace(ray.record, launched=launched), gpu)
    assert price is not None
    assert price == pytest.approx(planned.usd_per_hour)  # all GPUs of what it needs
    two_of_eight = own_budget.usd_per_hour(
        replace(ray.record, launched=launched), parse_demand('{"CPU": 2}')
    )
    assert two_of_eight is not None
    assert 0 < two_of_eight < price
    moved = replace(launched, config=str(tmp_path / "gone.yaml"))
    assert own_budget.usd_per_hour(replace(ray.record, launched=moved), gpu) is None
    ray.close()


def test_a_job_that_prefers_by_price_takes_the_cheapest_and_unknown_prices_last(
    priced: FakeRay, tmp_path: Path
) -> None:
    aws = str(Path(manta.__file__).parents[3] / "cluster" / "aws.yaml")
    access_ = record.Access(head="", user="u", key=None)
    launched = record.Launched(provider="aws", source=aws, config=aws, is_up=True, access=access_)
    record.save(replace(priced.record, name="aws", launched=launched))
    record.save(replace(priced.record, name="theirs", attached=True))
    spec = JobSpec(name="j", entrypoint="true", clusters=("theirs", "local", "aws"))
    by_price = spec.model_copy(update={"prefer": "price"})
    plan = plan_job(
        spec.model_copy(update={"resources": Resources(num_cpus=2)}),
        "true",
        submission_id="j",
        working_dir=tmp_path,
    )
    assert asking.placed(spec, plan).clusters == ("theirs", "local", "aws")
    assert asking.placed(by_price, plan).clusters == ("aws", "local", "theirs")


@pytest.fixture
def http(tmp_path: Path) -> Iterator[tuple[TestClient, State, dict[str, dict[str, str]]]]:
    state = states.open_state(f"sqlite:///{tmp_path}/state.db")
    roles = {"viewer": Role.VIEWER, "ann": Role.SUBMITTER, "root": Role.ADMIN}
    headers = {
        name: {"Authorization": f"Bearer {access.add(state, name, role, 'test')}"}
        for name, role in roles.items()
    }
    yield TestClient(http_api.app(state)), state, headers
    state.close()


def test_over_http_a_budget_below_the_price_is_a_400_in_the_same_words(
    priced: FakeRay, http: tuple[TestClient, State, dict[str, dict[str, str]]]
) -> None:
    client, state, keys = http
    job = {"id": "a", "entrypoint": "true", "resources": {"num_cpus": 2}, "timeout_s": 3600}
    answer = client.post("/api/v1/jobs", json=job | {"budget_usd": 3}, headers=keys["ann"])
    assert (answer.status_code, answer.json()["error"]) == (400, TOO_LITTLE)
    assert queries.listed(state) == []
    answer = client.post("/api/v1/jobs", json=job | {"budget_usd": 5}, headers=keys["ann"])
    assert answer.status_code == 200
    assert queries.request_of(state, "a").budget_usd == 5


def test_over_http_admins_set_budgets_and_viewers_read_them_and_the_costs(
    http: tuple[TestClient, State, dict[str, dict[str, str]]],
) -> None:
    client, state, keys = http
    url, body = "/api/v1/budgets/ml", {"usd": 500, "per": "week", "at_limit": "stop"}
    assert client.put(url, json=body, headers=keys["ann"]).status_code == 403
    assert client.put(url, json=body | {"usd": 0}, headers=keys["root"]).status_code == 422
    assert budgets.load(state) == []
    assert client.put(url, json=body, headers=keys["root"]).json()["state"] == "below"
    read = client.get("/api/v1/budgets", headers=keys["viewer"]).json()
    assert [(b["team"], b["usd"], b["per"], b["spent_usd"]) for b in read] == [
        ("ml", 500.0, "week", 0.0)
    ]
    costs = client.get("/api/v1/costs", headers=keys["viewer"]).json()
    assert (costs["owners"], costs["total"]["usd"]) == ({}, 0.0)
    assert client.delete(url, headers=keys["ann"]).status_code == 403
    assert client.delete(url, headers=keys["root"]).status_code == 200
    actors = [(e.kind, e.actor) for e in queries.events_of(state) if "budget" in e.kind]
    assert actors == [("budget set", "key:root"), ("budget removed", "key:root")]


def test_the_command_sets_lists_and_removes_budgets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MANTA_STATE", f"sqlite:///{tmp_path}/state.db")

    def run(*words: str) -> str:
        return CliRunner().invoke(budget_command.command, words).output

    assert "no team has a budget" in run("list")
    assert "0.00 of 500.00 USD a week" in run("set", "ml", "--usd", "500", "--per", "week")
    assert run("list").splitlines()[1].split() == [
        "ml",
        "500.00",
        "week",
        "0.00",
        "0",
        "%",
        "hold",
        "below",
    ]
    run("remove", "ml")
    assert json.loads(run("list", "--json")) == []


def test_a_count_that_began_before_a_budget_was_set_anew_does_not_overwrite_it(
    state: State, lease: Lease, monkeypatch: pytest.MonkeyPatch
) -> None:
    budgets.put(state, "ml", 1, "total", "hold", "ann")
    spend(state, lease, 5)
    add_up = budgets.spent

    def meanwhile(*arguments: Any) -> Any:
        found = add_up(*arguments)
        budgets.put(state, "ml", 1000, "total", "hold", "bob")
        return found

    monkeypatch.setattr(budgets, "spent", meanwhile)
    budgets.count(state, lease)
    assert (budgets.load(state)[0].usd, level(state)) == (1000, BELOW)
    assert kinds(state) == ["budget set", "budget set"]
