"""Several clusters for the same demand, cheapest first."""

from __future__ import annotations

from collections.abc import Iterable

from manta.plan.nodes import Plan


def cheapest_first(plans: Iterable[Plan]) -> tuple[Plan, ...]:
    """Plans that run everything before those where something waits; fully priced ones first."""
    return tuple(sorted(plans, key=lambda p: (len(p.pending), bool(p.unpriced), p.usd_per_hour)))
