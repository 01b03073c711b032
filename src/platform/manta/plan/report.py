"""A plan in words for people and as values for programs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from manta.plan.energy import Energy
from manta.plan.nodes import Advice, Line, Plan

COLUMNS = ("NODES", "TYPE", "MACHINE", "MARKET", "$/H EACH", "$/H", "HOLDS")


def rows(plan: Plan) -> list[tuple[str, ...]]:
    """One row for each line of the plan, under `COLUMNS`."""
    return [_row(line) for line in plan.lines]


def remarks(plan: Plan) -> Iterator[str]:
    """Totals, what waits, advice and assumptions, one line each."""
    yield _cost(plan)
    if plan.energy:
        yield _energy(plan.energy, plan.hours)
    for pending in plan.pending:
        yield f"Waits: {pending.what}: {pending.why}"
    for advice in plan.advice:
        yield _advice(advice)
    for note in plan.notes:
        yield f"Note: {note}"
    for source in plan.energy.sources if plan.energy else ():
        yield f"Source of {' '.join(source.split())}"


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain values; prices in USD, energy in kWh and gCO2e."""
    hours = plan.hours
    return {
        "cluster": plan.cluster.name,
        "file": plan.cluster.file,
        "cloud": plan.cluster.cloud,
        "region": plan.cluster.region,
        "nodes": [asdict(line) for line in plan.lines],
        "pending": [asdict(pending) for pending in plan.pending],
        "usd_per_hour": round(plan.usd_per_hour, 6),
        "on_demand_usd_per_hour": round(plan.on_demand_usd_per_hour, 6),
        "unpriced": list(plan.unpriced),
        "hours": hours,
        "usd": round(plan.usd_per_hour * hours, 6) if hours else None,
        "on_demand_usd": round(plan.on_demand_usd_per_hour * hours, 6) if hours else None,
        "energy": asdict(plan.energy) if plan.energy else None,
        "advice": [asdict(advice) for advice in plan.advice],
        "notes": list(plan.notes),
        "prices_updated": plan.prices_updated,
    }


def _row(line: Line) -> tuple[str, ...]:
    each = "?" if line.usd_per_hour is None else f"{line.usd_per_hour:.3f}"
    all_ = "?" if line.usd_per_hour is None else f"{line.count * line.usd_per_hour:.3f}"
    name = f"{line.node_type} (head)" if line.role == "head" else line.node_type
    holds = ", ".join(line.holds) or "-"
    return str(line.count), name, line.instance_type or "-", line.market, each, all_, holds


def _cost(plan: Plan) -> str:
    words = f"Cost: ${plan.usd_per_hour:,.2f} an hour"
    on_demand = plan.on_demand_usd_per_hour
    if on_demand - plan.usd_per_hour >= 0.005:
        words += f" (${on_demand:,.2f} all on demand)"
    if plan.hours:
        words += f"; ${plan.usd_per_hour * plan.hours:,.2f} for {plan.hours:g} h"
        if on_demand - plan.usd_per_hour >= 0.005:
            words += f" (${on_demand * plan.hours:,.2f})"
    if plan.unpriced:
        words += f"; without {', '.join(dict.fromkeys(plan.unpriced))}, whose price is not known"
    if plan.prices_updated:
        words += f"; prices of {plan.prices_updated}"
    return words


def _energy(energy: Energy, hours: float | None) -> str:
    words = (
        f"Energy: {energy.idle_kwh_per_hour:.2f} (idle) to {energy.full_kwh_per_hour:.2f} "
        f"(full load) kWh an hour, PUE {energy.pue:g}"
    )
    if energy.full_gco2e_per_hour is not None and energy.idle_gco2e_per_hour is not None:
        words += (
            f"; {energy.idle_gco2e_per_hour:,.0f} to {energy.full_gco2e_per_hour:,.0f} gCO2e an "
            f"hour at {energy.grid_gco2e_per_kwh:g} g/kWh"
        )
    if hours:
        words += f"; for {hours:g} h at full load {energy.full_kwh_per_hour * hours:,.1f} kWh"
        if energy.full_gco2e_per_hour is not None:
            words += f", {energy.full_gco2e_per_hour * hours / 1000:,.1f} kgCO2e"
    if energy.without:
        words += f"; without {', '.join(energy.without)}, whose power is not known"
    return words


def _advice(advice: Advice) -> str:
    launches = " + ".join(f"{name} × {count}" for name, count in advice.launches) or "no worker"
    return (
        f"Cheaper for this demand: {launches}, ${advice.usd_per_hour:,.2f} an hour "
        f"(${advice.saves_usd_per_hour:,.2f} less); {advice.change}"
    )
