"""What a team may spend in a period; kept in the state, counted by the controller.

A budget knows the level that it has reached in its period: at WARNED an event says so, once; at
REACHED new jobs of the team are held, and running ones stopped if it is set so. It is counted
against the prices that were known: a team whose clusters have none is never held.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import sqlalchemy as sa

from manta.errors import InputError
from manta.jobs import spending
from manta.jobs.costs import Cost
from manta.jobs.lease import Lease
from manta.state import State, events, now
from manta.state import budgets as table

Per = Literal["day", "week", "month", "total"]
AtLimit = Literal["hold", "stop"]

BELOW, WARNED, REACHED = 0, 1, 2
NAMES = ("below", "warned", "reached")
WARN_AT = 0.8
CONTROLLER = "controller"


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a team may spend in each period, and how far it has come."""

    team: str
    usd: float
    per: Per = "month"
    at_limit: AtLimit = "hold"
    period: str = ""
    """The period in which `level` was reached; see `period_of`."""
    level: int = BELOW
    spent_usd: float = 0.0
    """When the level was reached."""

    def level_at(self, at: float) -> int:
        """The level in the period of `at`, UTC seconds."""
        return self.level if self.period == period_of(self.per, at) else BELOW

    def words(self) -> str:
        """What is spent, for people."""
        span = "in all" if self.per == "total" else f"a {self.per}"
        return f"{money(self.spent_usd)} of {money(self.usd)} USD {span}"


def money(usd: float) -> str:
    """An amount for people: cents, and what is less than a dollar to three digits."""
    return f"{usd:.3g}" if 0 < usd < 1 else f"{usd:.2f}"


def load(state: State) -> list[Budget]:
    """All budgets, by team."""
    with state.read() as connection:
        rows = connection.execute(sa.select(table).order_by(table.c.team)).all()
    return [Budget(**row._mapping) for row in rows]


def put(state: State, team: str, usd: float, per: Per, at_limit: AtLimit, actor: str) -> Budget:
    """Set the budget of a team; what it has spent in the period counts at once.

    Raises InputError for an amount that makes no sense.
    """
    if not (math.isfinite(usd) and usd > 0):
        raise InputError(f"a budget of {usd:g} USD cannot be", "write an amount above 0")
    if not 0 < len(team) <= 200:
        raise InputError("that cannot be a team's name", "use 1 to 200 characters")
    at = now()
    spent = spending.report(state, "team", start_of(per, at)).get(team, Cost()).usd
    wanted = Budget(team=team, usd=usd, per=per, at_limit=at_limit, period=period_of(per, at))
    budget = _judged(wanted, spent, at)
    with state.write() as connection:
        connection.execute(table.delete().where(table.c.team == team))
        connection.execute(table.insert().values(**vars(budget)))
        span = "in all" if per == "total" else f"a {per}"
        text = f"team {team}: {money(usd)} USD {span}, then {at_limit}"
        _note(connection, actor, "budget set", text)
        _tell(connection, wanted, budget)
    return budget


def remove(state: State, team: str, actor: str) -> None:
    """Forget the budget of a team. It is no error if there is none."""
    with state.write() as connection:
        if connection.execute(table.delete().where(table.c.team == team)).rowcount:
            _note(connection, actor, "budget removed", f"team {team}")


def spent(state: State, budgets: Iterable[Budget]) -> dict[str, Cost]:
    """Team → what it has cost in the running period of its budget."""
    at, wanted = now(), list(budgets)
    by_period = {
        per: spending.report(state, "team", start_of(per, at))
        for per in {budget.per for budget in wanted}
    }
    return {b.team: by_period[b.per].get(b.team, Cost()) for b in wanted}


def listed(state: State) -> list[dict[str, Any]]:
    """For programs: each budget, and what is spent in its running period now."""
    found = load(state)
    costs, at = spent(state, found), now()
    return [
        {
            "team": budget.team,
            "usd": budget.usd,
            "per": budget.per,
            "at_limit": budget.at_limit,
            "period": period_of(budget.per, at),
            "spent_usd": costs[budget.team].usd,
            "is_partial": "usd" in costs[budget.team].partial(),
            "state": NAMES[budget.level_at(at)],
        }
        for budget in found
    ]


def count(state: State, lease: Lease) -> list[Budget]:
    """Bring all budgets up to date with what is spent, with an event for each that changes level.

    Raises LeaseLost.
    """
    before = load(state)
    costs, at = spent(state, before), now()
    after = [_judged(budget, costs[budget.team].usd, at) for budget in before]
    changed = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    if changed:
        with state.write() as connection:
            lease.check(connection)
            for old, new in changed:
                same = [table.c[name] == getattr(old, name) for name in vars(old)]
                row = table.update().where(*same).values(**vars(new))
                if connection.execute(row).rowcount:  # else it was set anew meanwhile
                    _tell(connection, old, new)
    return after


def holds(budgets: Iterable[Budget], at: float) -> dict[str, str]:
    """Team → why none of its jobs starts now."""
    reached = [budget for budget in budgets if budget.level_at(at) == REACHED]
    return {b.team: f"team {b.team} has reached its budget: {b.words()}" for b in reached}


def stops(budgets: Iterable[Budget], at: float) -> dict[str, str]:
    """Team → why its running jobs are stopped."""
    return holds((budget for budget in budgets if budget.at_limit == "stop"), at)


def period_of(per: Per, at: float) -> str:
    """The name of the period that `at` lies in: `2026-11`, `2026-W47`, `2026-11-22`; UTC."""
    formats = {"day": "%Y-%m-%d", "week": "%G-W%V", "month": "%Y-%m", "total": "total"}
    return datetime.fromtimestamp(at, UTC).strftime(formats[per])


def start_of(per: Per, at: float) -> float:
    """When the period began that `at` lies in; UTC seconds. A week begins on Monday."""
    if per == "total":
        return 0.0
    moment = datetime.fromtimestamp(at, UTC)
    day = moment.replace(hour=0, minute=0, second=0, microsecond=0)
    back = {"day": 0, "week": day.weekday(), "month": day.day - 1}[per]
    return (day - timedelta(days=back)).timestamp()


def _judged(budget: Budget, spent_usd: float, at: float) -> Budget:
    """The budget with the level that it is at. A warning stays until the period ends."""
    before = budget.level_at(at)
    warned = before >= WARNED or spent_usd >= WARN_AT * budget.usd
    level = REACHED if spent_usd >= budget.usd else WARNED if warned else BELOW
    period = period_of(budget.per, at)
    if (level, period) == (budget.level, budget.period):
        return budget
    return Budget(
        team=budget.team,
        usd=budget.usd,
        per=budget.per,
        at_limit=budget.at_limit,
        period=period,
        level=level,
        spent_usd=spent_usd,
    )


def _tell(connection: sa.Connection, old: Budget, new: Budget) -> None:
    """The event of a change; it also makes the controller look at who is held."""
    text = f"team {new.team}: {new.words()}"
    same_period = old.period == new.period
    if new.level == REACHED:
        what = "its jobs are stopped" if new.at_limit == "stop" else "new jobs are held"
        _note(connection, CONTROLLER, "budget reached", f"{text}; {what}")
    elif new.level == WARNED and not (same_period and old.level >= WARNED):
        _note(connection, CONTROLLER, "budget warning", text)
    elif old.level == REACHED:
        _note(connection, CONTROLLER, "budget released", text)


def _note(connection: sa.Connection, actor: str, kind: str, text: str) -> None:
    row = {"at": now(), "actor": actor, "kind": kind, "job_id": "", "cluster": "", "text": text}
    connection.execute(events.insert().values(**row))
