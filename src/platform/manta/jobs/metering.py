"""Which nodes each cluster had, and from when to when: one row for each node that Ray ever named.

Ray names a node anew each time it starts there. So a node that is seen twice was there in between,
also while no controller looked, and nothing is counted twice. A node that nobody saw end was there
until it was last seen; how long after that it was found to be gone is kept as `unseen_s`, and
costs nothing: that time is not known, and not guessed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import sqlalchemy as sa

from manta.cluster import dashboard, record
from manta.cluster.dashboard import Node
from manta.cluster.record import ClusterRecord
from manta.jobs import rates
from manta.jobs.books import SLOT
from manta.jobs.costs import NodeTime, Rate
from manta.jobs.lease import Lease
from manta.jobs.watch import Sight
from manta.state import State, now
from manta.state import nodes as table

EXTEND_S = 30.0
"""How often it is written down that nodes are still there: as much is lost at most."""
NO_RATE = Rate()


class Meter:
    """Keeps the table of nodes in line with what the newest looks at clusters showed."""

    def __init__(
        self,
        state: State,
        lease: Lease,
        max_running: int,
        rates_of: Callable[[ClusterRecord], Mapping[str, Rate]] = rates.of_cluster,
    ) -> None:
        self._state, self._lease, self._max_running = state, lease, max_running
        self._rates_of = rates_of
        self._looked_at: dict[str, float] = {}
        self._written_at: dict[str, float] = {}
        self._told: dict[str, frozenset[tuple[str, str]]] = {}
        self._there: set[str] = set()
        self._closed_at = 0.0

    def take_in(self, sights: Mapping[str, Sight], at: float) -> None:
        """Write down what has changed until `at`, UTC seconds. Raises LeaseLost, StateError."""
        for sight in sights.values():
            if sight.record and sight.answers and sight.nodes:
                self._take_in(sight.record, sight, at)
        there = {sight.cluster_id for sight in sights.values() if not sight.is_gone}
        on_record = {known.cluster_id for known in record.load_all()}
        gone = {sight.cluster_id for sight in sights.values() if sight.is_gone}
        there |= on_record - gone
        if there != self._there or not self._closed_at <= at < self._closed_at + EXTEND_S:
            self._close_others(there, at)
            self._there, self._closed_at = there, at

    def _take_in(self, cluster: ClusterRecord, sight: Sight, at: float) -> None:
        if self._looked_at.get(sight.cluster_id) == sight.resources_at:
            return  # the same look as before
        self._looked_at[sight.cluster_id] = sight.resources_at
        told = frozenset((node.id, node.state) for node in sight.nodes)
        last = self._written_at.get(sight.cluster_id, 0.0)
        if self._told.get(sight.cluster_id) == told and last <= at < last + EXTEND_S:
            return
        known = self._known(sight.cluster_id)
        new = [node for node in sight.nodes if node.id not in known]
        found = self._rates_of(cluster) if new else {}
        with self._state.write() as connection:
            self._lease.check(connection)
            if rows := [row for node in new if (row := self._row(cluster, node, found, at))]:
                connection.execute(table.insert(), rows)
            for node in sight.nodes:
                if node.state != "ALIVE" and known.get(node.id, at) is None:
                    _close(connection, sight.cluster_id, node, at)
            alive = [node.id for node in sight.nodes if node.state == "ALIVE"]
            _extend(connection, sight.cluster_id, alive, at)
            _lose(connection, table.c.cluster_id == sight.cluster_id, sight.nodes, at)
        self._told[sight.cluster_id], self._written_at[sight.cluster_id] = told, at

    def _known(self, cluster_id: str) -> dict[str, float | None]:
        """Node → when it ended; None as long as it has not."""
        query = sa.select(table.c.node_id, table.c.closed_at)
        with self._state.read() as connection:
            rows = connection.execute(query.where(table.c.cluster_id == cluster_id)).all()
        return {row.node_id: row.closed_at for row in rows}

    def _row(
        self, cluster: ClusterRecord, node: Node, found: Mapping[str, Rate], at: float
    ) -> dict[str, Any] | None:
        """None for a node that ended, and Ray does not say when it was there."""
        alive = node.state == "ALIVE"
        opened_at = min(node.started_at or at, at)
        if not alive and (node.ended_at is None or node.started_at is None):
            return None
        closed_at = None if alive else max(opened_at, min(node.ended_at or at, at))
        resources = {**node.total, **({SLOT: float(self._max_running)} if node.is_head else {})}
        rate = asdict(found.get(node.node_type, NO_RATE))
        rate |= {"price_source": rate.pop("source"), "price_date": rate.pop("date")}
        return rate | {
            "cluster_id": cluster.cluster_id,
            "node_id": node.id,
            "cluster": cluster.name,
            "address": node.address,
            "node_type": node.node_type,
            "resources": json.dumps(resources, sort_keys=True),
            "opened_at": opened_at,
            "seen_at": at if closed_at is None else closed_at,
            "closed_at": closed_at,
            "unseen_s": 0.0,
        }

    def _close_others(self, there: set[str], at: float) -> None:
        """End what is written down of clusters that are no more."""
        query = sa.select(table.c.cluster_id).where(table.c.closed_at.is_(None)).distinct()
        with self._state.read() as connection:
            gone = set(connection.execute(query).scalars()) - there
        if not gone:
            return
        with self._state.write() as connection:
            self._lease.check(connection)
            _lose(connection, table.c.cluster_id.in_(gone), (), at)


def last_look(state: State, cluster: ClusterRecord) -> None:
    """Note that the nodes that are written down are still there: they are about to be ended.

    For when no controller looks. Raises MantaError if the cluster or the database is silent.
    """
    alive = [node.id for node in dashboard.nodes(cluster) if node.state == "ALIVE"]
    with state.write() as connection:  # no lease: a later `seen_at` can only be truer
        _extend(connection, cluster.cluster_id, alive, now())


def read(state: State, since: float, until: float, clusters: Sequence[str] = ()) -> list[NodeTime]:
    """All nodes that were there within [since, until], cut to it; of `clusters` by id, or all."""
    query = sa.select(table).where(table.c.seen_at > since, table.c.opened_at < until)
    if clusters:
        query = query.where(table.c.cluster_id.in_(clusters))
    with state.read() as connection:
        rows = connection.execute(query.order_by(table.c.opened_at, table.c.node_id)).all()
    return [
        NodeTime(
            cluster_id=row.cluster_id,
            start=max(row.opened_at, since),
            end=min(row.seen_at, until),
            resources=json.loads(row.resources),
            rate=Rate(
                instance_type=row.instance_type,
                market=row.market,
                usd_per_hour=row.usd_per_hour,
                idle_watts=row.idle_watts,
                full_watts=row.full_watts,
                pue=row.pue,
                grid_gco2e_per_kwh=row.grid_gco2e_per_kwh,
                source=row.price_source,
                date=row.price_date,
            ),
        )
        for row in rows
    ]


def unseen_s(state: State, since: float) -> float:
    """Node-seconds after which nodes were found to be gone; whether they cost is not known."""
    query = sa.select(sa.func.sum(table.c.unseen_s)).where(table.c.closed_at > since)
    with state.read() as connection:
        return float(connection.execute(query).scalar() or 0.0)


def _extend(connection: sa.Connection, cluster_id: str, alive: Sequence[str], at: float) -> None:
    """Those nodes are there still. A clock that was set back takes nothing away."""
    mine = sa.and_(
        table.c.cluster_id == cluster_id, table.c.node_id.in_(alive), table.c.seen_at < at
    )
    still = table.c.closed_at.is_(None)
    connection.execute(table.update().where(mine, still).values(seen_at=at))


def _close(connection: sa.Connection, cluster_id: str, node: Node, at: float) -> None:
    """The node has ended, when Ray says; if it does not, when it was last seen."""
    mine = sa.and_(table.c.cluster_id == cluster_id, table.c.node_id == node.id)
    seen_at = connection.execute(sa.select(table.c.seen_at).where(mine)).scalar_one()
    ended_at = max(seen_at, min(node.ended_at or seen_at, at))
    unseen = 0.0 if node.ended_at else max(0.0, at - seen_at)
    values = {"seen_at": ended_at, "closed_at": ended_at, "unseen_s": unseen}
    connection.execute(table.update().where(mine).values(**values))


def _lose(
    connection: sa.Connection, which: sa.ColumnElement[bool], nodes: Sequence[Node], at: float
) -> None:
    """Nodes that nobody saw end have ended: they were there when they were last seen."""
    gone = sa.and_(which, table.c.closed_at.is_(None))
    if nodes:
        gone = sa.and_(gone, table.c.node_id.not_in([node.id for node in nodes]))
    unseen = sa.case((table.c.seen_at < at, at - table.c.seen_at), else_=0.0)
    values = {"closed_at": table.c.seen_at, "unseen_s": unseen}
    connection.execute(table.update().where(gone).values(**values))
