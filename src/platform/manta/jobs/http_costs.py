"""Costs and budgets over HTTP, in the words and numbers of `manta usage` and `manta budget`."""
# No `from __future__ import annotations`: FastAPI reads the annotations, and those here name
# dependencies that exist only inside a function.

from collections.abc import Callable
from typing import Annotated, Any, Literal

from fastapi import Depends, FastAPI
from fastapi import Query as Param
from pydantic import Field

from manta.jobs import budgets, queries, spending
from manta.jobs.access import Key
from manta.jobs.budgets import AtLimit, Per
from manta.jobs.http_body import Body
from manta.state import State, now

_Days = Annotated[float, Param(gt=0, le=36_500)]


class BudgetIn(Body):
    """What a team may spend in a period, and what happens when it has."""

    usd: float = Field(gt=0, le=1e12)
    per: Per = "month"
    at_limit: AtLimit = "hold"


def add(api: FastAPI, state: State, viewer: Callable[..., Key], admin: Callable[..., Key]) -> None:
    """Add the routes; `viewer` and `admin` refuse keys without that role."""
    may_read = [Depends(viewer)]

    @api.get("/api/v1/costs", dependencies=may_read)
    def costs(by: Literal["team", "user", "job"] = "team", days: _Days = 30) -> dict[str, Any]:
        """What teams, users or jobs cost in the last `days`; with `idle` it is the clusters' bill.

        null is unknown; `partial` names sums that leave something out because no source tells.
        """
        return spending.summary(state, by, now() - days * 86_400)

    @api.get("/api/v1/jobs/{job_id}/cost", dependencies=may_read)
    def cost(job_id: str) -> dict[str, Any]:
        """What all attempts of the job have cost so far."""
        return spending.as_json(spending.of_job(state, queries.get(state, job_id)))

    @api.get("/api/v1/budgets", dependencies=may_read)
    def listed() -> list[dict[str, Any]]:
        """Budgets of teams, and what they have spent in the running period."""
        return budgets.listed(state)

    @api.put("/api/v1/budgets/{team}")
    def put(team: str, budget: BudgetIn, key: Annotated[Key, Depends(admin)]) -> dict[str, Any]:
        """Set the budget of a team; what it has spent in the period counts."""
        actor = f"key:{key.name}"
        budgets.put(state, team, budget.usd, budget.per, budget.at_limit, actor)
        return next(found for found in budgets.listed(state) if found["team"] == team)

    @api.delete("/api/v1/budgets/{team}")
    def remove(team: str, key: Annotated[Key, Depends(admin)]) -> dict[str, Any]:
        """Forget the budget of a team; it is no error if there is none."""
        budgets.remove(state, team, f"key:{key.name}")
        return {"team": team}
