"""What the controller does about money, beside its work: meters nodes, counts budgets."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor

from manta.errors import MantaError
from manta.jobs import budgets, own_budget
from manta.jobs.lease import Lease
from manta.jobs.metering import Meter
from manta.jobs.model import Cause, Job
from manta.jobs.watch import Sight
from manta.state import State, now

PERIOD_S = 1.0
COUNT_S = 10.0
"""Before the first count of budgets, by when what ended meanwhile is known, and between two."""
MAX_SHARE = 0.05
"""Of one core, for counting: all attempts of the period are looked at each time."""
log = logging.getLogger(__name__)


class Accounts:
    """Works in a thread of the pool, so that it never holds up the queue."""

    def __init__(
        self, state: State, lease: Lease, pool: ThreadPoolExecutor, max_running: int
    ) -> None:
        self._state, self._lease, self._pool = state, lease, pool
        self._meter = Meter(state, lease, max_running)
        self._flight: Future[None] | None = None
        self._next_at = 0.0
        self._count_at = time.monotonic() + COUNT_S
        self._teams: Mapping[str, str] = {}
        self._jobs: Mapping[str, str] = {}

    def tick(self, sights: Mapping[str, Sight]) -> None:
        """Go on in the background, if it is time; returns at once."""
        if time.monotonic() < self._next_at or (self._flight and not self._flight.done()):
            return
        self._next_at = time.monotonic() + PERIOD_S
        self._flight = self._pool.submit(self._work, dict(sights))

    def stop_reason(self, job: Job) -> str:
        """Why a running job must end; empty if it need not. Plain Ray's jobs are left alone."""
        words = self._jobs.get(job.id) or self._teams.get(job.team, "")
        return f"{Cause.BUDGET}: {words}" if words and job.origin == "manta" else ""

    def _work(self, sights: Mapping[str, Sight]) -> None:
        try:
            self._meter.take_in(sights, now())
            if time.monotonic() >= self._count_at:
                self._count()
        except MantaError as error:  # the lease or the database: whoever renews it acts on that
            log.info("%s", error)
        except Exception:  # never let an account end the pool's thread unseen
            log.exception("accounts")

    def _count(self) -> None:
        begun = time.monotonic()
        self._teams = budgets.stops(budgets.count(self._state, self._lease), now())
        self._jobs = own_budget.over(self._state)
        taken_s = time.monotonic() - begun
        self._count_at = time.monotonic() + max(COUNT_S, taken_s / MAX_SHARE)
