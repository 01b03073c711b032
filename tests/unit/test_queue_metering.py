"""Which nodes there were, from when to when; on SQLite and on PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa
from fake_ray import FakeRay
from queue_state import request

import manta
from manta import state as states
from manta.cluster import record
from manta.cluster.dashboard import Node
from manta.jobs import lease as leases
from manta.jobs import metering, rates, spending, store
from manta.jobs.costs import IDLE, Rate, bill
from manta.jobs.lease import Lease, LeaseLost
from manta.jobs.metering import Meter
from manta.jobs.watch import Sight
from manta.plan.clusters import read_cluster
from manta.plan.price import quote
from manta.spec.catalog import default_paths, load_catalog
from manta.state import State

RATE = Rate(usd_per_hour=3.6, source="list", date="2026-07-20")
NOW = 1_800_000_000.0


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[record.ClusterRecord]:
    monkeypatch.setenv("MANTA_HOME", str(tmp_path / "home"))
    ray = FakeRay(tmp_path / "cluster")
    yield ray.record
    ray.close()


class Looker:
    """Looks at a cluster as the controller's watch does, at times that a test says."""

    def __init__(self, state: State, lease: Lease, cluster: record.ClusterRecord) -> None:
        self.state, self.lease, self.cluster = state, lease, cluster
        self.meter = Meter(state, lease, 16, lambda _: {"": RATE, "cpu": RATE})

    def sees(self, at: float, *nodes: Node) -> None:
        sight = Sight(
            name="local",
            begun_at=at,
            record=self.cluster,
            answers=True,
            resources_at=at,
            nodes=nodes,
        )
        self.meter.take_in({"local": sight}, NOW + at)

    def sees_nothing(self, at: float, *, gone: bool) -> None:
        sight = Sight(name="local", begun_at=at, record=self.cluster, answers=False, is_gone=gone)
        self.meter.take_in({"local": sight}, NOW + at)

    def spans(self) -> list[tuple[float, float]]:
        nodes = metering.read(self.state, 0, NOW + 1e9)
        return [(node.start - NOW, node.end - NOW) for node in nodes]


@pytest.fixture
def look(state: State, lease: Lease, cluster: record.ClusterRecord) -> Looker:
    return Looker(state, lease, cluster)


def node(name: str = "n1", since: float | None = None, until: float | None = None) -> Node:
    return Node(
        id=name,
        address="10.0.0.1",
        state="ALIVE" if until is None else "DEAD",
        is_head=name == "n1",
        total={"CPU": 4.0},
        started_at=None if since is None else NOW + since,
        ended_at=None if until is None else NOW + until,
    )


def test_a_node_costs_from_the_start_that_ray_names_until_it_was_last_seen(look: Looker) -> None:
    look.sees(100, node(since=40))
    assert look.spans() == [(40, 100)]
    look.sees(110, node(since=40))
    look.sees(200, node(since=40))
    assert look.spans() == [(40, 200)]
    assert bill(metering.read(look.state, 0, NOW + 1e9)).usd == pytest.approx(0.16)


def test_a_row_carries_price_source_and_place_and_the_head_the_places_of_drivers(
    look: Looker,
) -> None:
    look.sees(0, node("n1"), replace(node("n2"), node_type="gpu"))
    head, other = metering.read(look.state, 0, NOW + 1)
    assert head.resources == {"CPU": 4.0, "slot": 16.0}
    assert (head.rate.usd_per_hour, head.rate.source, head.rate.date) == (
        3.6,
        "list",
        "2026-07-20",
    )
    assert other.rate == Rate()  # nobody gives a price for that type: unknown, not 0


def test_a_controller_that_was_away_counts_a_node_that_stayed_once_and_wholly(
    look: Looker,
) -> None:
    look.sees(0, node())
    again = Looker(look.state, look.lease, look.cluster)  # after a restart
    again.sees(5000, node())
    assert look.spans() == [(0, 5000)]


def test_a_node_that_ended_unseen_ends_when_ray_says_it_did(look: Looker) -> None:
    look.sees(0, node("n1"), node("n2"))
    look.sees(3600, node("n1"), node("n2", since=-10, until=1000))
    assert look.spans() == [(0, 3600), (0, 1000)]
    assert metering.unseen_s(look.state, 0) == 0


def test_a_node_that_came_and_went_unseen_is_taken_from_what_ray_remembers(look: Looker) -> None:
    look.sees(0, node("n1"))
    look.sees(3600, node("n1"), node("n2", since=100, until=700), node("n3", until=9))
    assert look.spans() == [(0, 3600), (100, 700)]  # of n3 nobody knows when it started


def test_a_cluster_that_is_gone_costs_until_it_was_seen_and_the_rest_is_marked(
    look: Looker,
) -> None:
    look.sees(0, node())
    look.sees(60, node())
    look.sees_nothing(500, gone=False)  # silent: perhaps a network that is down
    assert metering.unseen_s(look.state, 0) == 0
    look.sees_nothing(660, gone=True)
    assert look.spans() == [(0, 60)]
    assert metering.unseen_s(look.state, 0) == pytest.approx(600)
    look.sees_nothing(990, gone=True)
    assert metering.unseen_s(look.state, 0) == pytest.approx(600)  # once


def test_a_cluster_without_a_record_is_closed_and_a_new_one_of_its_name_is_another(
    look: Looker, state: State, lease: Lease
) -> None:
    look.sees(0, node())
    record.save(replace(look.cluster, cluster_id="c2"))
    newer = Looker(state, lease, replace(look.cluster, cluster_id="c2"))
    newer.sees(100, node("m1"))
    newer.sees(200, node("m1"))
    assert look.spans() == [(0, 0), (100, 200)]
    record.forget("local")
    newer.meter.take_in({}, NOW + 300)
    with state.read() as connection:
        open_rows = sa.select(states.nodes).where(states.nodes.c.closed_at.is_(None))
        assert connection.execute(open_rows).all() == []


def test_writes_are_few_while_nothing_changes(look: Looker, state: State) -> None:
    for at in range(0, 29, 5):
        look.sees(at, node())
    assert look.spans() == [(0, 0)]
    look.sees(31, node())
    assert look.spans() == [(0, 31)]


def test_a_clock_that_is_set_back_takes_nothing_away(look: Looker) -> None:
    look.sees(0, node())
    look.sees(100, node())
    look.sees(50, node())
    assert look.spans() == [(0, 100)]


def test_before_a_cluster_is_ended_its_nodes_are_counted_until_then(
    state: State, lease: Lease, cluster: record.ClusterRecord
) -> None:
    look = Looker(state, lease, cluster)
    before = states.now() - 5000
    look.sees(before - NOW, node("n"), node("m"))
    metering.last_look(state, cluster)  # which has one node, named n
    spans = {end - start for start, end in look.spans()}
    assert min(spans) == 0
    assert max(spans) == pytest.approx(5000, abs=60)


def test_who_has_lost_the_lease_meters_nothing(look: Looker, state: State) -> None:
    look.lease.release(state)
    assert leases.acquire(state) is not None
    with pytest.raises(LeaseLost):
        look.sees(0, node())
    assert look.spans() == []


def test_jobs_and_idle_of_the_state_are_the_bill_of_the_nodes(
    look: Looker, state: State, lease: Lease
) -> None:
    look.sees(0, node(since=0), node("n2", since=0))
    asked = request("a", team="ml", shape='[["CPU", 4.0]]')
    job, _ = store.submit(state, asked, "ann")
    job, attempt = store.begin_attempt(
        state, lease, job, cluster="local", cluster_id=look.cluster.cluster_id
    )
    store.mark_running(state, lease, job, attempt, at=NOW + 100, node_id="n1")
    look.sees(300, node(since=0), node("n2", since=0))
    parts = spending.report(state, "team", NOW, NOW + 300)
    assert parts["ml"].usd == pytest.approx(0.2)  # half of two nodes for 200 s
    assert parts[IDLE].usd == pytest.approx(0.4)
    assert spending.total(parts).usd == pytest.approx(bill(metering.read(state, 0, 2 * NOW)).usd)
    later = spending.report(state, "job", NOW + 200, NOW + 250)
    assert later["a"].node_s == pytest.approx(50)


def test_a_state_of_a_version_without_these_tables_gets_them(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/state.db"
    older = states.open_state(url)
    with older.write() as connection:
        for table in (states.nodes, states.budgets):
            table.drop(connection)
    older.close()
    opened = states.open_state(url)
    assert metering.read(opened, 0, 1) == []
    opened.close()


def test_a_machine_of_ones_own_has_a_price_only_if_a_price_file_says_so(
    cluster: record.ClusterRecord, tmp_path: Path
) -> None:
    assert rates.of_cluster(cluster) == {}
    folder = tmp_path / "home" / "prices"
    folder.mkdir(parents=True)
    (folder / "own.yaml").write_text(
        "cloud: onprem\nupdated: 2026-11-01\npue: {value: 1.5, source: meter}\n"
        "regions: {site: {grid_gco2e_per_kwh: 300, electricity_usd_per_kwh: 0.2, source: bill}}\n"
        "instance_types:\n  local: {num_cpus: 8, memory_gib: 32, idle_watts: 50,\n"
        "    full_watts: 200, power_source: meter,\n"
        "    owned: {capital_usd: 8760, lifetime_years: 1}}\n"
    )
    rate = rates.of_cluster(cluster)[""]
    assert rate.usd_per_hour == pytest.approx(1 + 0.2 * 1.5 * 0.2)
    assert (rate.full_watts, rate.pue, rate.grid_gco2e_per_kwh) == (200, 1.5, 300)
    assert (rate.source, rate.date) == ("price file of onprem", "2026-11-01")


def test_a_launched_cluster_has_the_prices_of_its_plan_and_those_of_the_users_own_file(
    cluster: record.ClusterRecord, tmp_path: Path
) -> None:
    own = tmp_path / "negotiated.yaml"
    own.write_text(
        "cloud: aws\nupdated: 2026-11-02\n"
        "instance_types:\n  m7i.xlarge: {usd_per_hour: {us-west-2: 0.123}, price_source: ours}\n"
    )
    aws = Path(manta.__file__).parents[3] / "cluster" / "aws.yaml"
    launched = record.Launched(
        provider="aws",
        source=str(aws),
        config=str(aws),
        is_up=True,
        access=record.Access(head="", user="u", key=None),
        prices=(str(own),),
    )
    found = rates.of_cluster(replace(cluster, launched=launched))
    catalog = load_catalog([*default_paths(), own])
    planned = read_cluster(aws, catalog)
    assert found.keys() == {node.name for node in planned.node_types}
    for node in planned.node_types:
        assert found[node.name].usd_per_hour == quote(node, planned, catalog).usd_per_hour
    assert all(rate.full_watts and rate.pue == 1.135 for rate in found.values())
    head = found[planned.head]
    assert (head.usd_per_hour, head.source, head.date) == (0.123, "ours", "2026-11-02")
