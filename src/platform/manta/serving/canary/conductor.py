"""On the side of a deploy: gives the orders of traffic.py, repeats them, and collects replies."""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Iterator, Sequence

from manta.cluster.record import ClusterRecord
from manta.errors import MantaError
from manta.serving.apps import deploy
from manta.serving.apps.beat import beating
from manta.serving.apps.deploy import NotHealthy
from manta.serving.apps.lock import Lock
from manta.serving.apps.plan import CANDIDATE, ServeState, candidate_route
from manta.serving.canary import traffic
from manta.serving.canary.traffic import By, Order, Seen

HEARD_S = 15.0
"""Within this time a guard follows its first order, or there is none."""
REST_S = 30.0
"""How long answers that a candidate has begun are waited for; Serve waits for them again."""
_POLL_S = 0.2


class Conductor:
    """Says which share of some applications' requests their candidates answer."""

    def __init__(self, cluster: ClusterRecord, lock: Lock, names: Sequence[str], by: By) -> None:
        self._cluster, self._lock, self._names, self._by = cluster, lock, names, by
        self._token = secrets.token_hex(16)
        self._number = 0
        self._weight = self._shadow = 0.0
        self._abandon = self._rested = False
        self._turn = threading.Lock()
        self._told: dict[str, set[str]] = {name: set() for name in names}
        """Replicas of the running versions that were ever told anything, by application."""
        self._candidates: dict[str, set[str]] = {name: set() for name in names}
        self._seen: dict[str, Seen] = {}

    def share(self, weight: float, shadow: float = 0.0) -> None:
        """Have candidates answer this share from now on, and be asked again for that.

        Raises:
            MantaError: Serve or the storage cannot be reached, or another deploy has taken over.
        """
        with self._turn:
            self._weight, self._shadow = weight, shadow
            self._rested = self._rested and not weight and not shadow
            self._give_orders()

    def repeat(self) -> None:
        """Give the same orders again, to new replicas as well. Raises as `share`."""
        with self._turn:
            self._give_orders()

    def _give_orders(self) -> None:
        state = deploy.state(self._cluster)
        self._lock.check()
        self._number += 1
        for name in self._names:
            running, candidate = state.app(name), state.app(f"{name}{CANDIDATE}")
            for replica_id in running.replicas if running else ():
                self._told[name].add(replica_id)
                self._write(replica_id, self._order(state, name))
            for replica_id in candidate.replicas if candidate else ():
                self._candidates[name].add(replica_id)
                self._write(replica_id, Order(number=self._number, token=self._token))

    def _order(self, state: ServeState, name: str) -> Order:
        return Order(
            number=self._number,
            url=address(state) + candidate_route(name),
            weight=self._weight,
            shadow=self._shadow,
            abandon=self._abandon,
            by=self._by,
            token=self._token,
        )

    def _write(self, replica_id: str, order: Order) -> None:
        traffic.write_order(self._cluster.storage_url, replica_id, order)

    def replicas(self, name: str) -> frozenset[str]:
        """All that ran the running version of an application since the first order."""
        return frozenset(self._told[name])

    def candidates(self, name: str) -> frozenset[str]:
        """All that ran its candidate."""
        return frozenset(self._candidates[name])

    def seen(self, name: str) -> Seen:
        """What its replicas have told, those that have gone since included."""
        total = Seen()
        for replica_id in self.replicas(name):
            if told := traffic.read_seen(self._cluster.storage_url, replica_id):
                self._seen[replica_id] = told
            total = total.plus(self._seen.get(replica_id, Seen()))
        return total

    def require_guards(self) -> None:
        """Return when a replica of each application follows. Raises NotHealthy if none does."""
        if gone := [name for name in self._names if not self._told[name]]:
            what = f"no replica of `{gone[0]}` runs whose requests could be shared"
            raise NotHealthy(what, what, "deploy it without --canary and --shadow")
        deadline = time.monotonic() + HEARD_S
        while silent := [name for name in self._names if not self._follows(name)]:
            if time.monotonic() > deadline:
                what = f"`{silent[0]}` has no guard that could share its requests out"
                fix = "deploy it without --canary and --shadow, or build it with the guard"
                raise NotHealthy(what, what, fix)
            time.sleep(_POLL_S)

    def _follows(self, name: str) -> bool:
        self.seen(name)
        return not self._seen.keys().isdisjoint(self.replicas(name))

    def rest(self, *, abandon: bool = False) -> None:
        """Give everything back to the running versions; returns when the candidates are idle.

        Raises nothing: whatever cannot be told now comes true by itself within EXPIRY_S.

        Args:
            abandon: also what the candidates have not begun to answer.
        """
        if self._rested:
            return
        self._abandon = abandon
        with contextlib.suppress(MantaError):
            self.share(0.0)
        number, deadline = self._number, time.monotonic() + REST_S
        with contextlib.suppress(MantaError):
            while not self._rests(number) and time.monotonic() < deadline:
                time.sleep(_POLL_S)
        self._rested = True

    def _rests(self, number: int) -> bool:
        state = deploy.patient_state(self._cluster)
        for name in self._names:
            self.seen(name)
            app = state.app(name)
            alive = (app.replicas if app else frozenset()) & self._seen.keys()
            told = [self._seen[replica_id] for replica_id in alive]
            if any(one.num_open or one.number < number for one in told):
                return False
        return True

    def forget(self) -> None:
        """Delete the orders and replies."""
        for group in (*self._told.values(), *self._candidates.values()):
            for replica_id in group:
                traffic.forget(self._cluster.storage_url, replica_id)


@contextlib.contextmanager
def conducting(
    cluster: ClusterRecord, lock: Lock, names: Sequence[str], by: By
) -> Iterator[Conductor]:
    """A conductor whose orders hold during the block, and not for long after this process.

    Raises:
        MantaError: as `Conductor.share`.
    """
    conductor = Conductor(cluster, lock, names, by)
    conductor.share(0.0)
    try:
        with beating(conductor.repeat, traffic.BEAT_S, patience_s=traffic.EXPIRY_S):
            yield conductor
    finally:
        with contextlib.suppress(MantaError, OSError):
            conductor.forget()


def address(state: ServeState) -> str:
    """Where Serve's own proxies answer, as seen from any replica.

    There is one on each node that has a replica, on the same port.
    """
    host = state.http_host or "127.0.0.1"
    if host in ("0.0.0.0", "::", "localhost"):
        host = "127.0.0.1"
    return f"http://{f'[{host}]' if ':' in host else host}:{state.http_port}"
