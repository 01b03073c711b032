"""What teams and users are due, and may hold at most: kept in the state, read by each pass."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Literal

import sqlalchemy as sa

from manta.errors import InputError
from manta.jobs import budgets
from manta.jobs.books import SLOT, Share, Shares
from manta.state import State, events, now
from manta.state import shares as table

Kind = Literal["team", "user"]


def load(state: State) -> Shares:
    """All that are set, and who is held because a budget is spent."""
    with state.read() as connection:
        rows = connection.execute(sa.select(table).order_by(table.c.kind, table.c.name)).all()
    found: dict[str, dict[str, Share]] = {"team": {}, "user": {}}
    for row in rows:
        found[row.kind][row.name] = Share(weight=row.weight, limits=json.loads(row.limits))
    held = budgets.holds(budgets.load(state), now())
    return Shares(teams=found["team"], users=found["user"], held=held)


def put(state: State, kind: Kind, name: str, share: Share, actor: str) -> None:
    """Set the share of a team or user. Raises InputError for amounts that make no sense."""
    if share.weight <= 0 or any(limit < 0 for limit in share.limits.values()):
        raise InputError("a weight must be above 0 and a limit at least 0")
    with state.write() as connection:
        connection.execute(table.delete().where(table.c.kind == kind, table.c.name == name))
        row = {"weight": share.weight, "limits": json.dumps(dict(share.limits), sort_keys=True)}
        connection.execute(table.insert().values(kind=kind, name=name, **row))
        text = f"{kind} {name}: weight {share.weight:g}, {show(share.limits) or 'no limit'}"
        note = {"kind": "quota set", "job_id": "", "cluster": "", "text": text}
        connection.execute(events.insert().values(at=now(), actor=actor, **note))


def remove(state: State, kind: Kind, name: str, actor: str) -> None:
    """Back to the default. It is no error if nothing was set."""
    with state.write() as connection:
        gone = table.delete().where(table.c.kind == kind, table.c.name == name)
        if connection.execute(gone).rowcount:
            note = {"kind": "quota removed", "job_id": "", "cluster": ""}
            note |= {"text": f"{kind} {name}"}
            connection.execute(events.insert().values(at=now(), actor=actor, **note))


def show(limits: Mapping[str, float]) -> str:
    """Limits for people: `jobs=4, GPU=8`."""
    return ", ".join(
        f"{'jobs' if name == SLOT else name}={limit:g}" for name, limit in limits.items()
    )
