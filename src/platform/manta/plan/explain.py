"""When Ray's choice is not the cheapest: by how much, and which change gets the cheaper one.

Every claim is checked: each candidate change is applied to the node types and Ray's scheduler
asked again. Only changes that leave nothing more waiting and cost less are reported; what was not
tried is not claimed to be impossible.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations

from manta.plan.clusters import Cluster
from manta.plan.demand import Demand
from manta.plan.nodes import Advice, Plan, plan_cluster
from manta.spec.catalog import Catalog

MAX_TRIES = 64
LEAST_SAVING_USD_PER_HOUR = 0.005


def advise(plan: Plan, demand: Demand, catalog: Catalog) -> Plan:
    """`plan` with the cheapest change found within the YAML's limits, and beyond them."""
    if plan.unpriced or not demand:
        return plan
    within: Advice | None = None
    beyond: Advice | None = None
    for change, raised, changed in _candidates(plan):
        advice = _try(plan, changed, change, demand, catalog)
        if advice is None:
            continue
        if raised:
            beyond = _cheaper(beyond, advice)
        else:
            within = _cheaper(within, advice)
    if beyond and within and beyond.usd_per_hour >= within.usd_per_hour:
        beyond = None
    return replace(plan, advice=tuple(advice for advice in (within, beyond) if advice))


def _try(
    plan: Plan, changed: Cluster, change: str, demand: Demand, catalog: Catalog
) -> Advice | None:
    other = plan_cluster(changed, demand, catalog)
    saves = plan.usd_per_hour - other.usd_per_hour
    more_waits = {p.what for p in other.pending} - {p.what for p in plan.pending}
    if other.unpriced or more_waits or saves < LEAST_SAVING_USD_PER_HOUR:
        return None
    return Advice(
        change=change,
        launches=tuple((n.node_type, n.count) for n in other.lines if n.role == "worker"),
        usd_per_hour=other.usd_per_hour,
        saves_usd_per_hour=saves,
    )


def _cheaper(old: Advice | None, new: Advice) -> Advice:
    return new if old is None or new.usd_per_hour < old.usd_per_hour - 1e-9 else old


def _candidates(plan: Plan) -> Iterator[tuple[str, bool, Cluster]]:
    """(what to write, whether it raises a limit, the changed cluster), smallest changes first."""
    cluster = plan.cluster
    launched = [line.node_type for line in plan.lines if line.role == "worker"]
    launched = [name for name in launched if not cluster.node_type(name).min_workers]
    others = [n.name for n in cluster.node_types if n.name != cluster.head]
    excluded = [(name,) for name in launched] + list(combinations(launched, 2))
    tries = 0
    for names in excluded:
        for raised in [None, *others]:
            if tries >= MAX_TRIES:
                return
            if raised in names:
                continue
            tries += 1
            yield _changed(cluster, names, raised)
    for raised in others[: MAX_TRIES - tries]:
        yield _changed(cluster, (), raised)


def _changed(
    cluster: Cluster, without: tuple[str, ...], raised: str | None
) -> tuple[str, bool, Cluster]:
    limits = dict.fromkeys(without, 0)
    if raised:
        limits[raised] = cluster.max_workers
    words = [
        f"`max_workers: {limit}` under available_node_types.{name}{_line(cluster, name)}"
        for name, limit in limits.items()
    ]
    nodes = tuple(
        replace(node, max_workers=limits[node.name]) if node.name in limits else node
        for node in cluster.node_types
    )
    raises = bool(raised) and cluster.node_type(str(raised)).max_workers < cluster.max_workers
    return "write " + " and ".join(words), raises, replace(cluster, node_types=nodes)


def _line(cluster: Cluster, name: str) -> str:
    line = cluster.node_type(name).line
    return f" ({cluster.file}:{line})" if line else ""
