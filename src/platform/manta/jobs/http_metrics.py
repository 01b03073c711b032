"""The queue's metrics for Prometheus: whether a controller is at work, and jobs by state."""
# No `from __future__ import annotations`: FastAPI reads the annotations.

from collections.abc import Mapping, Sequence

from fastapi import FastAPI
from fastapi.params import Depends
from fastapi.responses import PlainTextResponse

from manta.jobs import lease, queries
from manta.jobs.model import JobState
from manta.state import State


def add(api: FastAPI, state: State, viewer: Sequence[Depends]) -> None:
    """Add the route; `viewer` refuses whoever may not read."""

    @api.get("/metrics", dependencies=viewer, response_class=PlainTextResponse)
    def metrics() -> str:
        """Metrics in Prometheus' text format."""
        return text(queries.counts(state), at_work=lease.holder(state) is not None)


def text(counts: Mapping[str, int], *, at_work: bool) -> str:
    """The page, from jobs by state; a state without a job is told as 0."""
    lines = [
        "# HELP manta_queue_controller Whether a controller is at work.",
        "# TYPE manta_queue_controller gauge",
        f"manta_queue_controller {int(at_work)}",
        "# HELP manta_queue_jobs Jobs that the queue knows, by state.",
        "# TYPE manta_queue_jobs gauge",
        *(f'manta_queue_jobs{{state="{one}"}} {counts.get(one, 0)}' for one in JobState),
    ]
    return "\n".join(lines) + "\n"
