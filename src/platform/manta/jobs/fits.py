"""What a cluster can be scaled to, and whether work can ever fit: asked of the plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from manta.cluster import dashboard
from manta.cluster.dashboard import Node
from manta.cluster.record import ClusterRecord
from manta.errors import InputError, MantaError
from manta.plan.clusters import Cluster, NodeType, read_cluster
from manta.plan.demand import Demand
from manta.spec.catalog import Catalog, default_paths, load_catalog


def capacity(record: ClusterRecord, nodes: Sequence[Node]) -> dict[str, float]:
    """All that the cluster has now, or the most that its YAML lets it grow to."""
    totals: dict[str, float] = {}
    for node in nodes:
        if node.state == "ALIVE":
            for name, amount in node.total.items():
                totals[name] = totals.get(name, 0.0) + amount
    if record.launched is None:
        return totals
    try:
        grown = _grown(read_cluster(record.launched.source, _catalog()))
    except MantaError:
        return totals  # its file has been moved or changed: what is there counts
    return {name: max(totals.get(name, 0.0), grown.get(name, 0.0)) for name in {**totals, **grown}}


def require_possible(record: ClusterRecord, demand: Demand) -> None:
    """Raise InputError, with the plan's reason, if the cluster could never hold `demand`."""
    if not demand or record.attached:
        return  # how far it can grow is not known here
    from manta.plan.nodes import plan_cluster

    if record.launched is None:
        catalog, cluster = Catalog(), _as_it_is(record)
    else:
        catalog = _catalog()
        cluster = read_cluster(record.launched.source, catalog)
    pending = plan_cluster(cluster, least(demand), catalog).pending
    if pending:
        raise InputError(
            f"cluster `{record.name}` can never hold {pending[0].what}: {pending[0].why}",
            "ask for less, or name another cluster with --cluster",
        )


def least(demand: Demand) -> Demand:
    """The least with which the work makes progress.

    Each kind of request and each kind of gang once: a search with one trial at a time is slow and
    not stuck, a training without all of its workers does not begin. Ray starts the others when
    there is room.
    """
    return Demand(
        requests=tuple(replace(r, count=1) for r in dict.fromkeys(demand.requests)),
        gangs=tuple(dict.fromkeys(demand.gangs)),
    )


def _as_it_is(record: ClusterRecord) -> Cluster:
    """A cluster that does not grow: each node is the only one of its type."""
    alive = [node for node in dashboard.nodes(record) if node.state == "ALIVE"]
    types = tuple(
        NodeType(
            name="head" if node.is_head else f"node {node.address}",
            resources=node.total,
            max_workers=0 if node.is_head else 1,
        )
        for node in alive
    )
    return Cluster(
        file="",
        name=record.name,
        provider="none",
        cloud=None,
        region=None,
        node_types=types,
        head="head",
        max_workers=len(types) - 1,
    )


def _grown(cluster: Cluster) -> Mapping[str, float]:
    """The head and, for each resource, the best choice of all workers that may exist."""
    most: dict[str, float] = {}
    for name in {name for node in cluster.node_types for name in node.resources}:
        workers = sorted(
            (amount for node in cluster.node_types for amount in _workers(node, name)),
            reverse=True,
        )
        head = cluster.node_type(cluster.head).resources.get(name, 0.0)
        most[name] = head + sum(workers[: cluster.max_workers])
    return most


def _workers(node: NodeType, resource: str) -> list[float]:
    return [node.resources.get(resource, 0.0)] * node.max_workers


def _catalog() -> Catalog:
    return load_catalog(default_paths())
