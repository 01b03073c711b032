"""The plan of a cluster: which nodes launch for a demand, what waits and why, price and energy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from manta.plan.clusters import Cluster, Market, NodeType
from manta.plan.demand import Bundle, Demand, Gang, show_bundle
from manta.plan.energy import Energy, estimate
from manta.plan.price import quote
from manta.plan.ray_scheduler import Decision, decide
from manta.spec.catalog import Catalog


@dataclass(frozen=True, kw_only=True)
class Line:
    """Nodes of one type in the plan."""

    node_type: str
    role: str
    """`head` or `worker`."""
    count: int
    instance_type: str | None
    market: Market
    usd_per_hour: float | None
    """Of one node."""
    on_demand_usd_per_hour: float | None
    holds: tuple[str, ...] = ()
    """What Ray puts on these nodes, all together."""


@dataclass(frozen=True, kw_only=True)
class Pending:
    """Something that would wait, and why."""

    what: str
    why: str


@dataclass(frozen=True, kw_only=True)
class Advice:
    """A cheaper cluster for the same demand; Ray's scheduler was run on the changed YAML."""

    change: str
    """What to write, and where."""
    launches: tuple[tuple[str, int], ...]
    usd_per_hour: float
    saves_usd_per_hour: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a cluster would be for a demand. Computed without network and clock."""

    cluster: Cluster
    lines: tuple[Line, ...]
    """Head first, then worker types in the order in which Ray asks for them."""
    pending: tuple[Pending, ...]
    energy: Energy | None
    notes: tuple[str, ...]
    prices_updated: str | None
    hours: float | None = None
    advice: tuple[Advice, ...] = ()

    @property
    def usd_per_hour(self) -> float:
        """Of all nodes whose price is known; see `unpriced`."""
        return sum(line.count * (line.usd_per_hour or 0) for line in self.lines)

    @property
    def on_demand_usd_per_hour(self) -> float:
        """The same nodes, all bought on demand."""
        return sum(line.count * (line.on_demand_usd_per_hour or 0) for line in self.lines)

    @property
    def unpriced(self) -> tuple[str, ...]:
        """Node types in the plan without a known price."""
        return tuple(line.node_type for line in self.lines if line.usd_per_hour is None)


def plan_cluster(
    cluster: Cluster, demand: Demand, catalog: Catalog, *, hours: float | None = None
) -> Plan:
    """Ask Ray's scheduler what it would launch for `demand`, and price it."""
    decision = decide(cluster.node_types, cluster.head, cluster.max_workers + 1, demand)
    counts = {cluster.head: 1}
    for name, count in decision.launches:
        counts[name] = counts.get(name, 0) + count
    quotes = {name: quote(cluster.node_type(name), cluster, catalog) for name in counts}
    lines: list[Line] = []
    for name, count in [(cluster.head, 1), *decision.launches]:
        role = "head" if not lines else "worker"
        node = cluster.node_type(name)
        lines.append(
            Line(
                node_type=name,
                role=role,
                count=count,
                instance_type=node.instance_type,
                market=node.market,
                usd_per_hour=quotes[name].usd_per_hour,
                on_demand_usd_per_hour=quotes[name].on_demand_usd_per_hour,
                holds=_holds(decision, name, is_head=role == "head"),
            )
        )
    notes = [*cluster.notes, *(note for q in quotes.values() for note in q.notes)]
    return Plan(
        cluster=cluster,
        lines=tuple(lines),
        pending=_pending(cluster, demand, decision, counts),
        energy=estimate([(cluster.node_type(n), c) for n, c in counts.items()], cluster, catalog),
        notes=tuple(dict.fromkeys(notes)),
        prices_updated=catalog.updated.get(cluster.cloud or ""),
        hours=hours,
    )


def _holds(decision: Decision, name: str, *, is_head: bool) -> tuple[str, ...]:
    bundles: Counter[Bundle] = Counter()
    for node in decision.nodes:
        if node.node_type == name and node.is_head == is_head:
            bundles.update(node.bundles)
    return tuple(f"{show_bundle(bundle)} × {count}" for bundle, count in bundles.items())


def _pending(
    cluster: Cluster, demand: Demand, decision: Decision, counts: Mapping[str, int]
) -> tuple[Pending, ...]:
    waiting = [
        Pending(
            what=f"{show_bundle(bundle)} × {count}",
            why=_why(cluster, bundle, _labels_of(demand, bundle), counts),
        )
        for bundle, count in decision.pending_requests
    ]
    for index in decision.pending_gangs:
        gang = demand.gangs[index]
        bundles = gang.bundles
        if gang.strategy == "STRICT_PACK":
            together: Counter[str] = Counter()
            for bundle in bundles:
                together.update(dict(bundle))
            bundles = (tuple(sorted(together.items())),)
        if gang.strategy == "STRICT_SPREAD" and (reason := _too_few_nodes(cluster, gang)):
            waiting.append(Pending(what=str(gang), why=reason))
            continue
        hard = max(bundles, key=lambda b: (not _fitting(cluster, b, ()), sum(n for _, n in b)))
        why = _why(cluster, hard, (), counts)
        if _fitting(cluster, hard, ()):
            why = f"all {len(gang.bundles)} bundles must start together; {why}"
        waiting.append(Pending(what=str(gang), why=why))
    return tuple(waiting)


def _too_few_nodes(cluster: Cluster, gang: Gang) -> str:
    """Why STRICT_SPREAD cannot be: fewer nodes allowed than bundles. Empty if that is not it."""
    smallest = min(gang.bundles, key=lambda bundle: sum(n for _, n in bundle))
    fitting = _fitting(cluster, smallest, ())
    allowed = sum(n.max_workers + (n.name == cluster.head) for n in fitting)
    if not fitting or min(allowed, cluster.max_workers + 1) >= len(gang.bundles):
        return ""
    names = ", ".join(f"{n.name} max_workers: {n.max_workers}" for n in fitting)
    return f"needs {len(gang.bundles)} nodes, one for each bundle; {allowed} allowed ({names})"


def _labels_of(demand: Demand, bundle: Bundle) -> tuple[tuple[str, str], ...]:
    return next((r.labels for r in demand.requests if r.bundle == bundle), ())


def _why(
    cluster: Cluster,
    bundle: Bundle,
    labels: Sequence[tuple[str, str]],
    counts: Mapping[str, int],
) -> str:
    """Which limit stands in the way, read off the YAML and the nodes that would launch."""
    fitting = _fitting(cluster, bundle, labels)
    if not fitting:
        return f"no node type can hold it: {_too_small(cluster, bundle, labels)}"
    full = [
        n for n in fitting if counts.get(n.name, 0) >= n.max_workers + (n.name == cluster.head)
    ]
    if len(full) == len(fitting):
        limits = ", ".join(f"{n.name} max_workers: {n.max_workers}" for n in fitting)
        return f"the node types that can hold it are at their limit ({limits})"
    if sum(counts.values()) > cluster.max_workers:
        return f"the cluster is at its limit (max_workers: {cluster.max_workers})"
    return "it does not fit beside what else is placed"


def _fitting(
    cluster: Cluster, bundle: Bundle, labels: Sequence[tuple[str, str]]
) -> list[NodeType]:
    return [
        node
        for node in cluster.node_types
        if all(quantity <= node.resources.get(name, 0) for name, quantity in bundle)
        and all(node.labels.get(key) == value for key, value in labels)
    ]


def _too_small(cluster: Cluster, bundle: Bundle, labels: Sequence[tuple[str, str]]) -> str:
    lacking = []
    for name, quantity in bundle:
        largest = max(node.resources.get(name, 0) for node in cluster.node_types)
        if largest < quantity:
            asked, most = show_bundle(((name, quantity),)), show_bundle(((name, largest),))
            lacking.append(
                f"asks for {asked}, the largest has {most}" if largest else f"no {name}"
            )
    if lacking:
        return "; ".join(lacking)
    if labels:
        return "no node type has the labels " + ", ".join(f"{k}={v}" for k, v in labels)
    return "no node type has all of it at once"
