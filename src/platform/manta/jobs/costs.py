"""Who pays for the nodes of a cluster: a share for each job, and the rest for nobody. Pure.

The rule, at each moment and for each cluster:

1. A job's share is its dominant one: the largest part of any resource that it asked for, of what
   the nodes that were there had of it, from the start of an attempt to its end; at most all. Its
   place among the running jobs (`SLOT`) is a resource too, so that who asks for nothing does not
   ride free. If the shares are more than one together (a job with all CPUs, another with all
   GPUs), each is divided by their sum.
2. It pays that share of all nodes' price and of their time, and draws that share of their power
   at full load.
3. The rest is `idle`: nodes that wait, what Serve applications take, and what starts and ends. It
   draws its share of the power of nodes without load.

So what jobs and idle pay together is what the nodes cost, by construction.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from manta.jobs.books import Needs

HOUR_S = 3600.0
IDLE = ""
"""Whom the time belongs to in which no job held anything."""


@dataclass(frozen=True, kw_only=True)
class Rate:
    """What an hour of a node costs, and the power that it draws. None where no source tells."""

    instance_type: str = ""
    market: str = ""
    usd_per_hour: float | None = None
    idle_watts: float | None = None
    full_watts: float | None = None
    pue: float | None = None
    grid_gco2e_per_kwh: float | None = None
    source: str = ""
    """Whose price it is; empty if there is none."""
    date: str = ""
    """Day of the price list, ISO 8601."""


@dataclass(frozen=True, kw_only=True)
class NodeTime:
    """A node, as long as it was seen: [start, end) in UTC seconds."""

    cluster_id: str
    start: float
    end: float
    resources: Mapping[str, float]
    rate: Rate


class Held(NamedTuple):
    """What an attempt held on a cluster, and for how long: [start, end) in UTC seconds."""

    owner: str
    cluster_id: str
    needs: Needs
    start: float
    end: float


@dataclass(kw_only=True)
class Cost:
    """Sums of what is known, and of how many node-seconds each is not known."""

    node_s: float = 0.0
    gpu_hours: float = 0.0
    usd: float = 0.0
    kwh: float = 0.0
    kgco2e: float = 0.0
    without_price_s: float = 0.0
    without_power_s: float = 0.0
    without_grid_s: float = 0.0

    def add(self, other: Cost, times: float = 1.0) -> None:
        """Add `times` × `other`."""
        for name, amount in vars(other).items():
            setattr(self, name, getattr(self, name) + times * amount)

    def amounts(self) -> dict[str, float | None]:
        """Sums by name; None where nothing is known of a part that there is."""
        sums: dict[str, float | None] = {"node_seconds": self.node_s, "gpu_hours": self.gpu_hours}
        for name, without_s in self._without().items():
            nothing = without_s > 0 and without_s >= self.node_s * (1 - 1e-9)
            sums[name] = None if nothing else getattr(self, name)
        return sums

    def partial(self) -> tuple[str, ...]:
        """Names of sums that leave something out, because no source tells."""
        return tuple(name for name, without_s in self._without().items() if without_s > 0)

    def _without(self) -> dict[str, float]:
        missing = (self.without_price_s, self.without_power_s, self.without_grid_s)
        return dict(zip(("usd", "kwh", "kgco2e"), missing, strict=True))


def allocate(nodes: Iterable[NodeTime], held: Iterable[Held]) -> dict[str, Cost]:
    """Owner → what it pays for. IDLE is always among them."""
    found: dict[str, Cost] = defaultdict(Cost)
    found[IDLE] = Cost()
    changes: dict[str, list[tuple[float, bool, NodeTime | Held]]] = defaultdict(list)
    items: list[NodeTime | Held] = [*nodes, *held]
    for item in items:
        if item.end > item.start:
            changes[item.cluster_id] += [(item.start, True, item), (item.end, False, item)]
    for mine in changes.values():
        _walk(sorted(mine, key=lambda change: change[0]), found)
    return dict(found)


def bill(nodes: Iterable[NodeTime]) -> Cost:
    """Time and price of the nodes as a provider adds them up: each by itself."""
    total = Cost()
    for node in nodes:
        span_s, gpus = node.end - node.start, node.resources.get("GPU", 0.0)
        usd_per_hour = node.rate.usd_per_hour
        total.node_s += span_s
        total.gpu_hours += gpus * span_s / HOUR_S
        total.usd += (usd_per_hour or 0.0) * span_s / HOUR_S
        total.without_price_s += span_s if usd_per_hour is None else 0.0
    return total


def share(needs: Needs, capacity: Mapping[str, float]) -> float:
    """The largest part of any resource that is asked for, at most 1."""
    parts = (amount / capacity[name] for name, amount in needs if capacity.get(name))
    return min(1.0, max(parts, default=0.0))


@dataclass
class _Site:
    """What is there on one cluster at a moment."""

    nodes: list[NodeTime] = field(default_factory=list)
    held: list[Held] = field(default_factory=list)
    capacity: dict[str, float] = field(default_factory=dict)
    busy: Cost = field(default_factory=Cost)
    """Of one second of all nodes at full load; no GPU-hours, which are the jobs' own."""
    idle: Cost = field(default_factory=Cost)
    """The same without load."""
    pays: list[tuple[str, float, float]] = field(default_factory=list)
    """Owner, its share of the nodes, and its GPUs."""
    paid_s: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Owner → seconds × share since the nodes last changed: they change seldom, jobs often."""
    parts: dict[Needs, tuple[float, float]] = field(default_factory=dict)
    """Needs → share and GPUs, of the nodes as they are: most jobs are alike."""

    def change(self, begins: bool, item: NodeTime | Held) -> None:
        items: list[NodeTime] | list[Held]
        items = self.nodes if isinstance(item, NodeTime) else self.held
        if begins:
            items.append(item)  # type: ignore[arg-type]  # the list of its own kind
        else:
            items.remove(item)  # type: ignore[arg-type]
        if isinstance(item, NodeTime):
            self._count_nodes()
        parts = [(holder.owner, *self._part(holder.needs)) for holder in self.held]
        most, gpus = self.capacity, sum(amount for _, _, amount in parts)
        scale = 1.0 / max(1.0, sum(part for _, part, _ in parts))
        gpu_scale = min(1.0, most.get("GPU", 0.0) / gpus) if gpus else 0.0
        self.pays = [(owner, part * scale, n * gpu_scale) for owner, part, n in parts]

    def _part(self, needs: Needs) -> tuple[float, float]:
        if needs not in self.parts:
            gpus = next((amount for name, amount in needs if name == "GPU"), 0.0)
            self.parts[needs] = share(needs, self.capacity), gpus
        return self.parts[needs]

    def _count_nodes(self) -> None:
        self.capacity, self.busy, self.idle = {}, Cost(), Cost()
        self.parts.clear()
        for node in self.nodes:
            for name, amount in node.resources.items():
                self.capacity[name] = self.capacity.get(name, 0.0) + amount
            self.busy.add(_second(node.rate, node.rate.full_watts))
            self.idle.add(_second(node.rate, node.rate.idle_watts))


def _walk(changes: Sequence[tuple[float, bool, NodeTime | Held]], found: dict[str, Cost]) -> None:
    site, before = _Site(), 0.0
    for at, begins, item in changes:
        if site.nodes and at > before:
            _charge(site, at - before, found)
        if isinstance(item, NodeTime):
            _settle(site, found)
        site.change(begins, item)
        before = at


def _charge(site: _Site, span_s: float, found: dict[str, Cost]) -> None:
    rest, gpus = 1.0, site.capacity.get("GPU", 0.0)
    for owner, part, amount in site.pays:
        site.paid_s[owner] += part * span_s
        if amount:
            found[owner].gpu_hours += amount * span_s / HOUR_S
        rest -= part
        gpus -= amount
    site.paid_s[IDLE] += max(0.0, rest) * span_s
    found[IDLE].gpu_hours += max(0.0, gpus) * span_s / HOUR_S


def _settle(site: _Site, found: dict[str, Cost]) -> None:
    for owner, paid_s in site.paid_s.items():
        found[owner].add(site.busy if owner != IDLE else site.idle, paid_s)
    site.paid_s.clear()


def _second(rate: Rate, watts: float | None) -> Cost:
    """One second of a node that draws so much."""
    cost = Cost(node_s=1.0, usd=(rate.usd_per_hour or 0.0) / HOUR_S)
    cost.without_price_s = 1.0 if rate.usd_per_hour is None else 0.0
    if watts is None or rate.pue is None:
        cost.without_power_s = cost.without_grid_s = 1.0
        return cost
    cost.kwh = watts * rate.pue / 1000 / HOUR_S
    if rate.grid_gco2e_per_kwh is None:
        cost.without_grid_s = 1.0
    else:
        cost.kgco2e = cost.kwh * rate.grid_gco2e_per_kwh / 1000
    return cost
