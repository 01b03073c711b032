"""What a job asks for, as the scheduling pass counts it: a sum of resources, in one string."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from manta.jobs.books import SLOT, Needs
from manta.jobs.fits import least
from manta.plan.demand import Demand, demand_of_work
from manta.spec import Resources, Work


def of_demand(demand: Demand) -> str:
    """The sum of the least with which the work makes progress; see `fits.least`."""
    total: dict[str, float] = {}
    wanted = least(demand)
    bundles = [request.bundle for request in wanted.requests]
    bundles += [bundle for gang in wanted.gangs for bundle in gang.bundles]
    for bundle in bundles:
        for name, amount in bundle:
            total[name] = total.get(name, 0.0) + amount
    return json.dumps(sorted(total.items()))


def of_resources(resources: Resources) -> str:
    """What an entrypoint alone asks for."""
    return of_demand(demand_of_work(Work(resources=resources), "", Path(), ""))


@cache
def needs(shape: str) -> Needs:
    """The shape for the pass, with the place that each job takes."""
    return ((SLOT, 1.0), *((str(name), float(amount)) for name, amount in json.loads(shape)))
