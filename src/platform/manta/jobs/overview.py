"""What a page about the queue shows beside the jobs: who waits for what, clusters, what was asked.

Read by many and often, so the waiting line is kept here and brought up to date by events, as the
controller keeps its own: a queue of 100,000 costs its reading once, and then what changes.
"""

from __future__ import annotations

import heapq
import json
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from manta.cluster import record
from manta.jobs import passes, queries, shape
from manta.jobs.schedule import why
from manta.jobs.view import View
from manta.state import State, now

HIDDEN = "…"
_LOOPBACK = {"127.0.0.1", "localhost", "::1"}
_PASSWORD = re.compile(r"(://)[^/@\s]+@")


@dataclass(frozen=True, kw_only=True)
class Wait:
    """A queued job, and what holds it up."""

    id: str
    seq: int
    priority: int
    user: str
    team: str
    cluster: str
    queued_at: float
    why: str


@dataclass(frozen=True, kw_only=True)
class SeenCluster:
    """A cluster that a controller has seen."""

    name: str
    state: str
    seen_at: float
    capacity: Mapping[str, float]
    held: Mapping[str, float]
    """By the queue's jobs on it; what Ray itself placed there is not known here."""
    dashboard_url: str
    """Empty if there is none on loopback of the machine that serves the page."""


class Overview:
    """A view of one state. Safe to use from several threads."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._view = View(state)
        self._lock = threading.Lock()

    def waiting(self, limit: int) -> list[Wait]:
        """The first so many in line, by priority and arrival, with what each waits for."""
        with self._lock:
            self._view.refresh()
            line = self._view.waiting
            plan = passes.as_written(self._state, line, self._view.active.values())
            at = now()
            first = heapq.nsmallest(limit, line, key=lambda job: (-job.priority, job.seq))
            return [
                Wait(
                    id=job.id,
                    seq=job.seq,
                    priority=job.priority,
                    user=job.user,
                    team=job.team,
                    cluster=job.cluster,
                    queued_at=job.queued_at,
                    why=why(plan, job, at),
                )
                for job in first
            ]

    def clusters(self) -> list[SeenCluster]:
        """All clusters that a controller has seen, by name."""
        held, dashboards = self._held(), _dashboards()
        return [
            SeenCluster(
                name=seen["name"],
                state=seen["state"],
                seen_at=seen["seen_at"],
                capacity=json.loads(seen["resources"]),
                held=held.get(seen["name"], {}),
                dashboard_url=dashboards.get(seen["name"], "") if seen["state"] == "up" else "",
            )
            for seen in queries.clusters_seen(self._state)
        ]

    def _held(self) -> dict[str, dict[str, float]]:
        found: dict[str, dict[str, float]] = {}
        with self._lock:
            self._view.refresh()
            for job in self._view.active.values():
                if job.origin != "manta":
                    continue
                held = found.setdefault(job.cluster, {})
                for name, amount in shape.needs(job.shape):
                    held[name] = held.get(name, 0.0) + amount
        return found


def asked(state: State, job_id: str) -> dict[str, Any]:
    """What was asked for, without the values of variables and passwords in URLs."""
    request = queries.request_of(state, job_id).model_dump(mode="json")
    runtime_env = request.pop("runtime_env_passthrough")
    variables = runtime_env.pop("env_vars", None)
    names = sorted(variables) if isinstance(variables, dict) else []
    told = {"environment": names, "runtime_env": runtime_env, **request}
    hidden: dict[str, Any] = without_passwords(told)
    return hidden


def without_passwords(value: Any) -> Any:
    """A JSON value without passwords in URLs and without environment variables."""
    if isinstance(value, str):
        return _PASSWORD.sub(rf"\1{HIDDEN}@", value)
    if isinstance(value, dict):
        return {
            key: HIDDEN if key == "env_vars" else without_passwords(inner)
            for key, inner in value.items()
        }
    return (
        [without_passwords(inner) for inner in value] if isinstance(value, list | tuple) else value
    )


def _dashboards() -> dict[str, str]:
    try:
        known = record.load_all()
    except FileNotFoundError:  # one went away while they were read; the next look sees the rest
        return {}
    return {
        found.name: found.dashboard_url
        for found in known
        if urlsplit(found.dashboard_url).hostname in _LOOPBACK
    }
