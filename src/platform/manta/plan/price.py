"""What a node costs an hour: list prices, attached GPUs, or a machine of your own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from manta.plan.clusters import Cluster, Market, NodeType
from manta.spec.catalog import Catalog, InstanceType, Price

HOURS_PER_YEAR = 8760.0


@dataclass(frozen=True, kw_only=True)
class Quote:
    """The price of one node; None where no source gives one."""

    usd_per_hour: float | None
    on_demand_usd_per_hour: float | None
    """The same node bought on demand; equal to the price unless it is a spot node."""
    notes: tuple[str, ...] = ()
    """What is assumed: another region's price, on demand instead of spot."""


def quote(node: NodeType, cluster: Cluster, catalog: Catalog) -> Quote:
    """The price of one node of this type in the cluster's region."""
    machine = _machine(node, cluster, catalog)
    if machine is None:
        what = node.instance_type or f"provider {cluster.provider}"
        return Quote(
            usd_per_hour=None,
            on_demand_usd_per_hour=None,
            notes=(f"{node.name}: no price known for {what}",),
        )
    if machine.owned:
        price = owned_usd_per_hour(machine, cluster, catalog)
        return Quote(usd_per_hour=price, on_demand_usd_per_hour=price)
    parts = [(machine.name, 1, machine.prices)]
    for name, count in node.attached:
        gpu = catalog.accelerators.get((machine.cloud, name))
        parts.append((name, count, gpu.prices if gpu else {}))
    on_demand, notes = _sum(parts, cluster.region, "on-demand")
    if node.market != "spot":
        return Quote(usd_per_hour=on_demand, on_demand_usd_per_hour=on_demand, notes=notes)
    spot, spot_notes = _sum(parts, cluster.region, "spot")
    if spot is None and on_demand is not None:
        note = (
            f"{machine.name}: no spot price known; counted at its on-demand price, an upper bound"
        )
        return Quote(
            usd_per_hour=on_demand, on_demand_usd_per_hour=on_demand, notes=(*notes, note)
        )
    return Quote(usd_per_hour=spot, on_demand_usd_per_hour=on_demand, notes=spot_notes)


def owned_usd_per_hour(machine: InstanceType, cluster: Cluster, catalog: Catalog) -> float:
    """An hour of work on a machine of your own, USD.

    (capital / lifetime + upkeep a year) / (hours a year × share of them that work), plus the
    electricity of one hour at full power: watts / 1000 × PUE × price of a kWh.
    """
    owned = machine.owned
    assert owned is not None
    a_year = owned.capital_usd / owned.lifetime_years + owned.upkeep_usd_per_year
    fixed = a_year / (HOURS_PER_YEAR * owned.utilization)
    region = catalog.region(machine.cloud, cluster.region or "")
    if region is None or region.electricity_usd_per_kwh is None or machine.power is None:
        return fixed
    pue = catalog.pue_of.get(machine.cloud, (1.0, ""))[0]
    return fixed + machine.power.full_watts / 1000 * pue * region.electricity_usd_per_kwh


def _machine(node: NodeType, cluster: Cluster, catalog: Catalog) -> InstanceType | None:
    if cluster.cloud is None or node.instance_type is None:
        return None
    return catalog.find(cluster.cloud, node.instance_type)


def _sum(
    parts: list[tuple[str, int, Mapping[str, Price]]], region: str | None, market: Market
) -> tuple[float | None, tuple[str, ...]]:
    total, notes = 0.0, []
    for name, count, prices in parts:
        usd, used = _lookup(prices, region, market)
        if usd is None:
            return None, (f"{name}: no {market} price known",)
        if used != region:
            notes.append(f"{name}: {market} price of {used}; none known for {region}")
        total += count * usd
    return total, tuple(notes)


def _lookup(
    prices: Mapping[str, Price], region: str | None, market: Market
) -> tuple[float | None, str | None]:
    """The price here or else, on the same continent, the first other region that has one."""

    def usd(price: Price) -> float | None:
        spot = market == "spot"
        return price.spot_usd_per_hour if spot else price.on_demand_usd_per_hour

    here = prices.get(region or "")
    if here is not None and usd(here) is not None:
        return usd(here), region
    for other, price in prices.items():
        if usd(price) is not None and other[:2] == (region or "")[:2]:
            return usd(price), other
    return None, None
