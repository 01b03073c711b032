"""Who pays for nodes: jobs by their dominant share, the rest is idle, together the bill."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from manta.jobs.books import SLOT
from manta.jobs.costs import IDLE, Cost, Held, NodeTime, Rate, allocate, bill, share

RATE = Rate(
    usd_per_hour=3.6, idle_watts=100, full_watts=500, pue=1.2, grid_gco2e_per_kwh=400, source="x"
)
"""0.001 USD a second."""


def node(start: float, end: float, rate: Rate = RATE, **resources: float) -> NodeTime:
    return NodeTime(cluster_id="c", start=start, end=end, resources=resources, rate=rate)


def held(owner: str, start: float, end: float, **needs: float) -> Held:
    return Held(owner, "c", tuple(sorted(needs.items())), start, end)


def whole(parts: dict[str, Cost]) -> Cost:
    total = Cost()
    for cost in parts.values():
        total.add(cost)
    return total


def test_a_job_pays_its_largest_part_of_any_resource_while_it_runs() -> None:
    parts = allocate(
        [node(0, 100, CPU=8, GPU=4), node(0, 100, CPU=8)], [held("a", 20, 70, CPU=4, GPU=2)]
    )
    assert parts["a"].node_s == pytest.approx(0.5 * 2 * 50)
    assert parts["a"].usd == pytest.approx(0.05)
    assert parts["a"].gpu_hours == pytest.approx(2 * 50 / 3600)
    assert parts[IDLE].usd == pytest.approx(0.15)
    assert parts[IDLE].gpu_hours == pytest.approx((4 * 100 - 2 * 50) / 3600)


def test_jobs_draw_full_power_for_their_share_and_the_rest_draws_idle_power() -> None:
    parts = allocate([node(0, 3600, CPU=8)], [held("a", 0, 3600, CPU=2)])
    assert parts["a"].kwh == pytest.approx(0.25 * 0.5 * 1.2)
    assert parts[IDLE].kwh == pytest.approx(0.75 * 0.1 * 1.2)
    assert parts["a"].kgco2e == pytest.approx(parts["a"].kwh * 0.4)


def test_shares_that_are_more_than_the_cluster_together_are_scaled_down() -> None:
    wants = [held("a", 0, 10, CPU=8), held("b", 0, 10, CPU=8), held("c", 0, 10, GPU=4)]
    parts = allocate([node(0, 10, CPU=8, GPU=4)], wants)
    assert [parts[name].usd for name in "abc"] == pytest.approx([0.01 / 3] * 3)
    assert parts[IDLE].usd == pytest.approx(0.0)


def test_who_asks_for_nothing_pays_for_the_place_of_its_driver() -> None:
    assert share(((SLOT, 1.0),), {"CPU": 4.0, SLOT: 16.0}) == 1 / 16
    assert share((("TPU", 1.0),), {"CPU": 4.0}) == 0.0
    assert share((("GPU", 8.0),), {"GPU": 1.0}) == 1.0  # the others are on their way


def test_time_without_nodes_costs_nothing_and_clusters_do_not_mix() -> None:
    other = replace(node(0, 10, CPU=1), cluster_id="d")
    parts = allocate([node(0, 10, CPU=1), other], [held("a", 5, 99, CPU=1)])
    assert parts["a"].node_s == pytest.approx(5)
    assert parts[IDLE].node_s == pytest.approx(15)


def test_what_no_source_tells_is_said_to_be_unknown_and_never_counted_as_nothing() -> None:
    unknown = node(0, 3600, Rate(), CPU=1)
    assert allocate([unknown], [])[IDLE].amounts() == {
        "node_seconds": 3600.0,
        "gpu_hours": 0.0,
        "usd": None,
        "kwh": None,
        "kgco2e": None,
    }
    mixed = allocate([unknown, node(0, 3600, CPU=1)], [])[IDLE]
    assert mixed.amounts()["usd"] == pytest.approx(3.6)
    assert mixed.partial() == ("usd", "kwh", "kgco2e")
    assert allocate([node(0, 9, CPU=1)], [])[IDLE].partial() == ()
    no_grid = allocate([node(0, 9, replace(RATE, grid_gco2e_per_kwh=None))], [])[IDLE]
    assert no_grid.partial() == ("kgco2e",)


def chance_case(seed: int) -> tuple[list[NodeTime], list[Held]]:
    """Nodes and jobs at random: none to many, overlapping or not, some without price or power."""
    chance = np.random.default_rng(seed)

    def span(most: int) -> tuple[float, float]:
        start = int(chance.integers(0, most))
        return float(start), float(start + chance.integers(0, most))

    def rate() -> Rate:
        if chance.random() < 0.1:
            return Rate()
        usd = None if chance.random() < 0.1 else float(chance.uniform(0.1, 90))
        idle, full = sorted(chance.uniform(50, 5000, 2))
        return Rate(usd_per_hour=usd, idle_watts=idle, full_watts=full, pue=1.1)

    nodes = [
        NodeTime(
            cluster_id=str(chance.choice(["c", "d"])),
            start=(at := span(1000))[0],
            end=at[1],
            resources={"CPU": float(chance.integers(1, 65)), "GPU": float(chance.integers(0, 9))},
            rate=rate(),
        )
        for _ in range(chance.integers(0, 12))
    ]
    jobs = [
        Held(
            f"job{number % 7}",
            str(chance.choice(["c", "d"])),
            (("CPU", float(chance.integers(0, 40))), ("GPU", float(chance.integers(0, 10)))),
            *span(1000),
        )
        for number in range(chance.integers(0, 40))
    ]
    return nodes, jobs


@pytest.mark.parametrize("seed", range(200))
def test_jobs_and_idle_are_the_bill_in_every_random_case(seed: int) -> None:
    nodes, jobs = chance_case(seed)
    parts, billed = allocate(nodes, jobs), bill(nodes)
    total = whole(parts)
    for name in ("node_s", "gpu_hours", "usd", "without_price_s"):
        assert getattr(total, name) == pytest.approx(getattr(billed, name), rel=1e-6, abs=1e-9)
    for cost in parts.values():
        assert all(amount >= 0 for amount in vars(cost).values())


@pytest.mark.parametrize("seed", range(20))
def test_each_jobs_cost_is_what_a_clock_that_ticks_each_second_adds_up(seed: int) -> None:
    nodes, jobs = chance_case(seed)
    parts = allocate(nodes, jobs)
    ticked: dict[str, float] = {}
    for second in range(2000):
        at = second + 0.5
        for cluster in "cd":
            there = [n for n in nodes if n.cluster_id == cluster and n.start <= at < n.end]
            usd = sum(n.rate.usd_per_hour or 0 for n in there) / 3600
            sizes = {name: sum(n.resources[name] for n in there) for name in ("CPU", "GPU")}
            running = [j for j in jobs if j.cluster_id == cluster and j.start <= at < j.end]
            asked = [
                min(1, max([a / sizes[n] for n, a in j.needs if sizes[n]], default=0))
                for j in running
            ]
            for job, part in zip(running, asked, strict=True):
                paid = usd * part / max(1, sum(asked))
                ticked[job.owner] = ticked.get(job.owner, 0) + paid
            ticked[IDLE] = ticked.get(IDLE, 0) + usd * max(0, 1 - sum(asked))
    for owner, usd in ticked.items():
        assert parts.get(owner, Cost()).usd == pytest.approx(usd, rel=0.01, abs=1e-9)
