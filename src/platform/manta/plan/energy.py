"""Energy and CO2e of a planned cluster: power × PUE × grid intensity, each with its source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from manta.plan.clusters import Cluster, NodeType
from manta.spec.catalog import Catalog, Power


@dataclass(frozen=True, kw_only=True)
class Energy:
    """Of all nodes together, for an hour: idle to full load."""

    idle_kwh_per_hour: float
    full_kwh_per_hour: float
    idle_gco2e_per_hour: float | None
    full_gco2e_per_hour: float | None
    """None where the grid's intensity is not known. Operation only, not manufacture."""
    pue: float
    grid_gco2e_per_kwh: float | None
    sources: tuple[str, ...]
    without: tuple[str, ...] = ()
    """Node types whose power no source gives: not in the figures."""


def estimate(
    nodes: Sequence[tuple[NodeType, int]], cluster: Cluster, catalog: Catalog
) -> Energy | None:
    """The energy of (node type, count); None if the power of none of them is known."""
    idle = full = 0.0
    sources: list[str] = []
    without = []
    for node, count in nodes:
        power = power_of(node, cluster, catalog)
        if power is None:
            without.append(node.name)
            continue
        idle += count * power.idle_watts
        full += count * power.full_watts
        sources.append(f"power: {power.source}")
    if not sources:
        return None
    cloud = cluster.cloud or ""
    pue, pue_source = catalog.pue_of.get(cloud, (1.0, "not known, taken as 1"))
    region = catalog.region(cloud, cluster.region or "")
    grid = region.grid_gco2e_per_kwh if region else None
    sources.append(f"PUE: {pue_source}")
    if region and grid is not None:
        sources.append(f"grid: {region.source}")
    idle_kwh, full_kwh = idle / 1000 * pue, full / 1000 * pue
    return Energy(
        idle_kwh_per_hour=idle_kwh,
        full_kwh_per_hour=full_kwh,
        idle_gco2e_per_hour=None if grid is None else idle_kwh * grid,
        full_gco2e_per_hour=None if grid is None else full_kwh * grid,
        pue=pue,
        grid_gco2e_per_kwh=grid,
        sources=tuple(dict.fromkeys(sources)),
        without=tuple(without),
    )


def power_of(node: NodeType, cluster: Cluster, catalog: Catalog) -> Power | None:
    """What one node draws, its GPUs included; None if no source tells."""
    machine = catalog.find(cluster.cloud or "", node.instance_type or "")
    if machine is None or machine.power is None:
        return None
    idle, full, sources = machine.power.idle_watts, machine.power.full_watts, machine.power.source
    for name, count in node.attached:
        gpu = catalog.accelerators.get((machine.cloud, name))
        if gpu is None or gpu.power is None:
            return None
        idle += count * gpu.power.idle_watts
        full += count * gpu.power.full_watts
    return Power(idle_watts=idle, full_watts=full, source=sources)
