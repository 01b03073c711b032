"""How replicas share one count: an actor of the cluster, asked once a request.

Only requests of keys that have limits go there. While the actor is away (it starts again by
itself) each replica counts alone, so that for these seconds a key may have its limit once per
replica; refusing everybody would be worse.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import threading
import time
from typing import Any, Protocol

from manta.errors import MantaError
from manta.serving.access import usage
from manta.serving.access.limits import Counter, Denial, Spent, month_of
from manta.serving.guard.slowness import Board
from manta.spec.guard import Limits

ACTOR_TIMEOUT_S = 1.0
START_TIMEOUT_S = 60.0
NAMESPACE = "manta"
BUDGET_REFRESH_S = 10.0

logger = logging.getLogger(__name__)


class Limiter(Protocol):
    """Who is asked whether a request fits."""

    async def start(self) -> None:
        """Get ready; returns when the first request can be asked for."""

    async def acquire(
        self, grant_id: str, key_id: str, limits: Limits, num_tokens: int, cost_usd: float = 0.0
    ) -> Denial | None:
        """Let a request in, or say why not."""

    def finish(self, grant_id: str, num_tokens: int, cost_usd: float = 0.0) -> None:
        """A request has ended; never waits, and may be called for one that was not let in."""

    def heartbeat(self) -> None:
        """This replica is alive; never waits."""

    async def compare(self, application: str, median_s: float) -> list[float]:
        """Tell how long this replica's requests wait; how long those of its siblings do."""


class LocalLimiter:
    """Counts in this process."""

    def __init__(self, replica: str, counter: Counter | None = None) -> None:
        self.counter = counter or Counter()
        self._replica = replica

    async def start(self) -> None:
        """Nothing to get ready."""

    async def acquire(
        self, grant_id: str, key_id: str, limits: Limits, num_tokens: int, cost_usd: float = 0.0
    ) -> Denial | None:
        """Let a request in, or say why not."""
        now = time.time()
        return self.counter.acquire(
            grant_id, key_id, limits, num_tokens, self._replica, now, cost_usd
        )

    def finish(self, grant_id: str, num_tokens: int, cost_usd: float = 0.0) -> None:
        """A request has ended."""
        self.counter.finish(grant_id, num_tokens, time.time(), cost_usd)

    def heartbeat(self) -> None:
        """This replica is alive."""
        self.counter.heartbeat(self._replica, time.time())

    async def compare(self, application: str, median_s: float) -> list[float]:
        """There are no siblings here."""
        return []


class CounterActor:
    """The cluster's counter, made a Ray actor by `shared`; its calls run one after the other."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._counter = Counter()
        self._board = Board()
        self._known: tuple[str, dict[str, Spent]] | None = None
        threading.Thread(target=self._read_budgets, daemon=True).start()

    def acquire(
        self,
        grant_id: str,
        key_id: str,
        limits: Limits,
        num_tokens: int,
        replica: str,
        cost_usd: float = 0.0,
    ) -> Denial | None:
        """See Counter.acquire."""
        now = time.time()
        if self._known:
            self._counter.at_least(*self._known, now)
            self._known = None
        return self._counter.acquire(grant_id, key_id, limits, num_tokens, replica, now, cost_usd)

    def finish(self, grant_id: str, num_tokens: int, cost_usd: float = 0.0) -> None:
        """See Counter.finish."""
        self._counter.finish(grant_id, num_tokens, time.time(), cost_usd)

    def heartbeat(self, replica: str) -> None:
        """See Counter.heartbeat."""
        self._counter.heartbeat(replica, time.time())

    def compare(self, application: str, replica: str, median_s: float) -> list[float]:
        """See Board.tell."""
        return self._board.tell(application, replica, median_s, time.monotonic())

    def in_use(self, key_id: str) -> int:
        """Requests of the key that are being answered."""
        return self._counter.in_use(key_id)

    def _read_budgets(self) -> None:
        """What was used before this actor started, and on other clusters of the same storage."""
        while True:
            month = month_of(time.time())
            try:
                self._known = month, usage.spent_by_key(self._root, month)
            except MantaError as error:
                logger.warning("use of %s cannot be read: %s", month, error)
            time.sleep(BUDGET_REFRESH_S)


def shared(root: str) -> Any:
    """The cluster's counter for the keys under `root`; started if there is none."""
    import ray

    name = f"manta-limits-{hashlib.sha256(root.encode()).hexdigest()[:8]}"
    actor = ray.remote(num_cpus=0, max_restarts=-1)(CounterActor)
    return actor.options(
        name=name, namespace=NAMESPACE, get_if_exists=True, lifetime="detached"
    ).remote(root)


class SharedLimiter:
    """Asks the cluster's counter, and counts alone while that does not answer."""

    def __init__(self, replica: str, root: str) -> None:
        self._replica = replica
        self._root = root
        self._actor: Any = None
        self._alone = LocalLimiter(replica)
        self._away = False

    async def start(self) -> None:
        """Wait until the actor runs: its process takes seconds to start."""
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await self._counter().heartbeat.remote(self._replica)
        except Exception as error:  # requests are answered without it
            self._note(error)

    async def acquire(
        self, grant_id: str, key_id: str, limits: Limits, num_tokens: int, cost_usd: float = 0.0
    ) -> Denial | None:
        """Let a request in, or say why not."""
        try:
            async with asyncio.timeout(ACTOR_TIMEOUT_S):
                answer = await self._counter().acquire.remote(
                    grant_id, key_id, limits, num_tokens, self._replica, cost_usd
                )
        except Exception as error:  # whatever Ray raises while the actor starts again
            self._note(error)
            return await self._alone.acquire(grant_id, key_id, limits, num_tokens, cost_usd)
        self._away = False
        denial: Denial | None = answer
        return denial

    def finish(self, grant_id: str, num_tokens: int, cost_usd: float = 0.0) -> None:
        """A request has ended. Ray keeps one caller's calls in order: after its `acquire`."""
        self._alone.finish(grant_id, num_tokens, cost_usd)
        self._tell("finish", grant_id, num_tokens, cost_usd)

    def heartbeat(self) -> None:
        """This replica is alive."""
        self._alone.heartbeat()
        if self._actor is not None:
            self._tell("heartbeat", self._replica)

    async def compare(self, application: str, median_s: float) -> list[float]:
        """Tell how long this replica's requests wait; how long those of its siblings do."""
        try:
            answer = await self._counter().compare.remote(application, self._replica, median_s)
        except Exception as error:
            self._note(error)
            return []
        siblings: list[float] = answer
        return siblings

    def _counter(self) -> Any:
        if self._actor is None:
            self._actor = shared(self._root)
        return self._actor

    def _tell(self, method: str, *arguments: object) -> None:
        try:
            getattr(self._counter(), method).remote(*arguments)
        except Exception as error:  # as above; the counter frees what it does not hear of
            self._note(error)

    def _note(self, error: Exception) -> None:
        if not self._away:
            logger.warning("the counter of limits does not answer (%r); counting alone", error)
        self._away = True
