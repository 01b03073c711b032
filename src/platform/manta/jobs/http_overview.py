"""Routes that the web page needs beside those of jobs and events; reading only."""
# No `from __future__ import annotations`: FastAPI reads the annotations.

from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query
from fastapi.params import Depends

import manta
from manta.jobs import lease, overview, queries, reports, runs, usage
from manta.state import State, now

_Few = Annotated[int, Query(ge=1, le=500)]
_Seq = Annotated[int | None, Query(ge=0, le=2**62)]
_Days = Annotated[float, Query(gt=0, le=36_500)]


def add(api: FastAPI, state: State, viewer: Sequence[Depends]) -> None:
    """Add the routes; `viewer` refuses whoever may not read."""
    page = overview.Overview(state)

    @api.get("/api/v1/summary", dependencies=viewer)
    def summary() -> dict[str, Any]:
        """Jobs by state, who is the controller (empty: nobody), and the time here."""
        return {
            "now": now(),
            "version": manta.__version__,
            "controller": lease.holder(state) or "",
            "counts": queries.counts(state),
        }

    @api.get("/api/v1/waiting", dependencies=viewer)
    def waiting(limit: _Few = 50) -> list[dict[str, Any]]:
        """The first in line, by priority and arrival, with what each waits for."""
        return [asdict(wait) for wait in page.waiting(limit)]

    @api.get("/api/v1/clusters", dependencies=viewer)
    def clusters() -> list[dict[str, Any]]:
        """Clusters that a controller has seen: what they have, what the queue's jobs hold."""
        return [asdict(cluster) for cluster in page.clusters()]

    @api.get("/api/v1/jobs/{job_id}/request", dependencies=viewer)
    def request(job_id: str) -> dict[str, Any]:
        """What was asked for; of environment variables only the names."""
        return overview.asked(state, job_id)

    @api.get("/api/v1/jobs/{job_id}/report", dependencies=viewer)
    def report(job_id: str) -> dict[str, Any]:
        """What the job said of itself: artifacts and metrics; empty if nothing."""
        asked = queries.request_of(state, job_id)
        told: dict[str, Any] = overview.without_passwords(
            asdict(reports.read(reports.url_of(asked)))
        )
        return told

    @api.get("/api/v1/runs", dependencies=viewer)
    def pipeline_runs(limit: _Few = 20, before_seq: _Seq = None) -> list[dict[str, Any]]:
        """The newest pipeline runs, newest first, with their steps."""
        return [_told(run) for run in runs.listed(state, limit, before_seq)]

    @api.get("/api/v1/usage", dependencies=viewer)
    def held(
        by: Literal["team", "user", "job"] = "team", days: _Days = 30
    ) -> list[dict[str, Any]]:
        """What teams, users or jobs have held in the last `days`, the largest first."""
        found = usage.report(state, by, now() - days * 86_400)
        return [{"owner": owner, **asdict(one)} for owner, one in found.items()]


def _told(run: runs.Run) -> dict[str, Any]:
    told: dict[str, Any] = overview.without_passwords(asdict(run))
    return told
