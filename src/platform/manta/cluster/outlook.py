"""A launched cluster as it is now: state, demand that waits and why, events, cost an hour."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from manta.cluster import dashboard, launcher, tunnel
from manta.cluster.dashboard import Node
from manta.cluster.record import ClusterRecord
from manta.errors import InputError, MantaError
from manta.plan.clusters import Cluster, read_cluster
from manta.plan.demand import Demand, Request, bundle_of
from manta.plan.price import quote
from manta.spec.catalog import Catalog, default_paths, load_catalog

if TYPE_CHECKING:  # it loads Ray, which the controller and every command would pay for
    from manta.plan.nodes import Pending

NUM_EVENTS = 8
_DEMAND = re.compile(r"^ (\{.*\}): (\d+)\+? (.+)$")
_USED = re.compile(r"^ ([\d.]+)/([\d.]+) (\S+)$")


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What the nodes that are there now cost."""

    usd_per_hour: float
    unpriced: tuple[str, ...]
    """Node types whose price is not known; they are not in the sum."""


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """What the autoscaler knows and does, and what the cluster costs."""

    used: dict[str, float]
    pending_nodes: tuple[str, ...]
    failures: tuple[str, ...]
    waiting: tuple[Pending, ...]
    events: tuple[str, ...]
    cost: Cost


@dataclass(frozen=True, kw_only=True)
class Reach:
    """Whether a launched cluster answers."""

    cluster: ClusterRecord
    state: str
    """`up`, `starting` (`manta up` goes on with it) or `not answering`."""
    why: str = ""


def reach(cluster: ClusterRecord) -> Reach:
    """Open the tunnel and ask once; nothing is raised."""
    assert cluster.launched
    was_up = cluster.launched.is_up
    begun = "not answering" if was_up else "starting"
    try:
        cluster = tunnel.ensure(cluster)
        dashboard.get(cluster, "/api/jobs/")
    except MantaError as error:
        return Reach(cluster=cluster, state=begun, why=error.what)
    return Reach(cluster=cluster, state="up" if was_up else "starting")


def look(cluster: ClusterRecord, nodes: Sequence[Node]) -> Outlook:
    """Ask the autoscaler. Raises MantaError if the cluster is silent."""
    assert cluster.launched
    text = dashboard.autoscaler_text(cluster)
    planned, catalog = read_planned(cluster)
    return Outlook(
        used={
            name: float(used) for used, _, name in _matches(_USED, _section(text, "Total Usage"))
        },
        pending_nodes=_said(_section(text, "Pending")),
        failures=_said(_section(text, "Recent failures")),
        waiting=waiting(_section(text, "Pending Demands"), planned, catalog),
        events=tuple(dashboard.autoscaler_events(cluster)[-NUM_EVENTS:]),
        cost=cost(nodes, planned, catalog),
    )


def waiting(
    lines: Sequence[str], planned: Cluster | None, catalog: Catalog
) -> tuple[Pending, ...]:
    """Pending demands of the autoscaler's report, each with why Ray's scheduler leaves it."""
    from manta.plan.nodes import Pending

    found = []
    for shape, count, what in _matches(_DEMAND, lines):
        bundle = bundle_of({name: float(n) for name, n in _literal(shape).items()})
        asked = Demand(requests=(Request(bundle=bundle, count=min(int(count), 1000)),))
        found.append(Pending(what=f"{shape} × {count}, {what}", why=_why(asked, planned, catalog)))
    known = {line for line in lines if _DEMAND.match(line)}
    others = [Pending(what=line, why="") for line in _said([x for x in lines if x not in known])]
    return (*found, *others)


def _why(asked: Demand, planned: Cluster | None, catalog: Catalog) -> str:
    """What Ray's scheduler, asked offline about this cluster's file, says of the demand."""
    if planned is None or not any(node.resources for node in planned.node_types):
        return ""
    from manta.plan.nodes import plan_cluster

    pending = plan_cluster(planned, asked, catalog).pending
    if pending:
        return pending[0].why
    return "a node for it is on its way, or one that is there has to become free"


def cost(nodes: Sequence[Node], planned: Cluster | None, catalog: Catalog) -> Cost:
    """Price of the nodes that are alive, by the price lists that `manta plan` uses."""
    counts = Counter(node.node_type for node in nodes if node.state == "ALIVE")
    prices = _prices(planned, catalog) if planned else {}
    return Cost(
        usd_per_hour=sum(count * (prices.get(name) or 0) for name, count in counts.items()),
        unpriced=tuple(sorted(name for name in counts if prices.get(name) is None)),
    )


def _prices(planned: Cluster, catalog: Catalog) -> Mapping[str, float | None]:
    return {node.name: quote(node, planned, catalog).usd_per_hour for node in planned.node_types}


def read_planned(cluster: ClusterRecord) -> tuple[Cluster | None, Catalog]:
    """The derived file as `manta plan` reads it; None if that is not possible any more."""
    assert cluster.launched
    try:
        catalog = load_catalog([*default_paths(), *cluster.launched.prices])
        planned = read_cluster(cluster.launched.config, catalog)
        return _with_resources(planned, Path(cluster.launched.config)), catalog
    except InputError:
        return None, Catalog()


def _with_resources(planned: Cluster, config: Path) -> Cluster:
    """On-premise, what a host holds stands in the derived file, and no catalogue has it."""
    if planned.provider != launcher.ON_PREMISE:
        return planned
    types = yaml.safe_load(config.read_text())["available_node_types"]
    nodes = (
        replace(node, resources=types.get(node.name, {}).get("resources") or node.resources)
        for node in planned.node_types
    )
    return replace(planned, node_types=tuple(nodes))


def _section(text: str, title: str) -> list[str]:
    """The indented lines under a title of the autoscaler's report."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.strip() == f"{title}:"), len(lines))
    taken = []
    for line in lines[start + 1 :]:
        if not line.startswith(" "):
            break
        taken.append(line)
    return taken


def _said(lines: Sequence[str]) -> tuple[str, ...]:
    """Without the lines that say that there is nothing."""
    return tuple(line.strip() for line in lines if not line.strip().startswith("(no"))


def _matches(pattern: re.Pattern[str], lines: Sequence[str]) -> Iterator[tuple[str, ...]]:
    return (found.groups() for line in lines if (found := pattern.match(line)))


def _literal(shape: str) -> Mapping[str, float]:
    try:
        value = ast.literal_eval(shape)
    except (ValueError, SyntaxError):
        return {}
    return {name: n for name, n in value.items() if isinstance(n, int | float)}
