"""What a job asks for, as the scheduling pass counts it: a sum of resources, in one string."""

from __future__ import annotations

import json
from functools import cache

from manta.jobs.books import SLOT, Needs
from manta.plan.demand import Demand


def of_demand(demand: Demand) -> str:
    """The least with which the work makes progress.

    Each kind of request and each kind of gang once: a search with one trial at a time is slow and
    not stuck, a training without all of its workers does not begin. Ray starts the others when
    there is room.
    """
    total: dict[str, float] = {}
    bundles = [request.bundle for request in dict.fromkeys(demand.requests)]
    bundles += [bundle for gang in dict.fromkeys(demand.gangs) for bundle in gang.bundles]
    for bundle in bundles:
        for name, amount in bundle:
            total[name] = total.get(name, 0.0) + amount
    return json.dumps(sorted(total.items()))


@cache
def needs(shape: str) -> Needs:
    """The shape for the pass, with the place that each job takes."""
    return ((SLOT, 1.0), *((str(name), float(amount)) for name, amount in json.loads(shape)))
