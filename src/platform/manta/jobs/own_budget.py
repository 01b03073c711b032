"""A job's own budget: refused at submission if its price is above it, ended when it is spent."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from manta.cluster import dashboard, outlook, record
from manta.cluster.record import ClusterRecord
from manta.errors import InputError, MantaError
from manta.jobs import queries, rates, shape, spending
from manta.jobs.books import MAX_RUNNING, SLOT
from manta.jobs.costs import HOUR_S, share
from manta.jobs.fits import least
from manta.jobs.model import JobState
from manta.plan.demand import Demand
from manta.state import State


class OverBudget(InputError):
    """A job's budget is below its price."""


def require_enough(
    budget_usd: float | None, timeout_s: float | None, demand: Demand, clusters: Collection[str]
) -> None:
    """Raise OverBudget if running until `timeout_s` would cost more on each of `clusters`.

    The price is the plan's, for the nodes with which the work makes progress, times the share of
    them that the job will be charged. Without `timeout_s` nothing is known in advance; a cluster
    that does not answer, or has no known price, might be cheap enough.
    """
    if budget_usd is None or timeout_s is None:
        return
    known = {found.name: found for found in record.load_all()}
    prices = {}
    for name in clusters:
        price = usd_per_hour(known[name], demand) if name in known else None
        if price is None:
            return
        prices[name] = price
    name = min(prices, key=lambda cluster: prices[cluster])
    cost = prices[name] * timeout_s / HOUR_S
    if cost > budget_usd:
        raise OverBudget(
            f"`budget_usd` {budget_usd:g} is below the price: {prices[name]:.4g} USD/h on cluster "
            f"`{name}` for `timeout_s` {timeout_s:g} is {cost:.4g} USD",
            f"write at least {cost:.4g}, or a timeout_s of {budget_usd / cost * timeout_s:.0f}",
        )


def cheapest_first(clusters: Sequence[str], demand: Demand) -> tuple[str, ...]:
    """`clusters` by what an hour of such a job is charged; those whose price is unknown last."""
    known = {found.name: found for found in record.load_all()}

    def price(name: str) -> float:
        usd = usd_per_hour(known[name], demand) if name in known else None
        return float("inf") if usd is None else usd

    return tuple(sorted(clusters, key=price))


def usd_per_hour(cluster: ClusterRecord, demand: Demand) -> float | None:
    """What an hour of such a job is charged on the cluster; None if that is not known."""
    if cluster.attached:
        return None
    try:
        whole = _local(cluster) if cluster.is_here else _planned(cluster, demand)
    except MantaError:
        return None
    if whole is None:
        return None
    price, capacity = whole
    needs = shape.needs(shape.of_demand(demand))
    return price * share(needs, {**capacity, SLOT: float(MAX_RUNNING)})


def over(state: State) -> dict[str, str]:
    """Running job → words, of those that have spent their own budget."""
    found = {}
    for job in queries.listed(state, states=(JobState.RUNNING,)):
        budget_usd = queries.request_of(state, job.id).budget_usd
        if budget_usd is None:
            continue
        spent_usd = spending.of_job(state, job).usd
        if spent_usd >= budget_usd:
            found[job.id] = f"the job has spent {spent_usd:.4g} of its {budget_usd:g} USD"
    return found


def _local(cluster: ClusterRecord) -> tuple[float, dict[str, float]] | None:
    alive = [node for node in dashboard.nodes(cluster) if node.state == "ALIVE"]
    rate = rates.of_cluster(cluster).get("")
    if rate is None or rate.usd_per_hour is None:
        return None
    return rate.usd_per_hour * len(alive), _sum([(1, node.total) for node in alive])


def _planned(cluster: ClusterRecord, demand: Demand) -> tuple[float, dict[str, float]] | None:
    from manta.plan.nodes import plan_cluster

    planned, catalog = outlook.read_planned(cluster)
    if planned is None:
        return None
    plan = plan_cluster(planned, least(demand), catalog)
    if plan.unpriced:
        return None
    types = [(line.count, planned.node_type(line.node_type).resources) for line in plan.lines]
    return plan.usd_per_hour, _sum(types)


def _sum(parts: Sequence[tuple[int, Mapping[str, float]]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for count, resources in parts:
        for name, amount in resources.items():
            total[name] = total.get(name, 0.0) + count * amount
    return total
