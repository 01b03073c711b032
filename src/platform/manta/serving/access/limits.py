"""What keys have used, and whether one more request fits: pure, with time given from outside.

Requests and tokens are counted over the last 60 s, not per calendar minute, so that no stretch of
60 s holds more than the limit. A request reserves an estimate of its tokens when it comes and is
corrected to what the engine counted when it ends.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from manta.spec.guard import Limits

WINDOW_S = 60.0
SLOT_S = 0.25
"""Resolution of the window: an entry counts up to this much longer than 60 s (0.4 %)."""
ROUNDING_USD = 1e-9
"""Sums of fractions are not exact: a budget may be used to its last token."""
REPLICA_TIMEOUT_S = 10.0
"""A replica not heard of for so long is gone, and its requests with it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Denial:
    """Why a request does not fit, and when to try again."""

    code: str
    """`rate_limit_exceeded` or `insufficient_quota`, as OpenAI has them."""
    message: str
    retry_after_s: float


class Window:
    """A sum over the last 60 s."""

    def __init__(self) -> None:
        self._slots: deque[list[int]] = deque()
        self._total = 0

    def total(self, now: float) -> int:
        """What was added in the last 60 s."""
        oldest = (now - WINDOW_S) / SLOT_S - 1
        while self._slots and self._slots[0][0] <= oldest:
            self._total -= self._slots.popleft()[1]
        return self._total

    def add(self, amount: int, at: float) -> None:
        """Add what happened at `at`; a correction of something older than 60 s has no effect."""
        slot = int(at / SLOT_S)
        for entry in reversed(self._slots):
            if entry[0] == slot:
                entry[1] += amount
                self._total += amount
                return
            if entry[0] < slot:
                break
        if self._slots and self._slots[-1][0] > slot:
            return
        self._slots.append([slot, amount])
        self._total += amount

    def wait_s(self, amount: int, limit: int, now: float) -> float:
        """How long until `amount` more fits under `limit`, if nothing else comes."""
        left = self.total(now)
        for slot, held in self._slots:
            left -= held
            if left + amount <= limit:
                return max(0.0, (slot + 1) * SLOT_S + WINDOW_S - now)
        return WINDOW_S


@dataclass(frozen=True, kw_only=True, slots=True)
class Spent:
    """What a key had in a month."""

    num_tokens: int = 0
    cost_usd: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Grant:
    """A request that was let in and has not ended."""

    key_id: str
    replica: str
    at: float
    num_tokens: int
    """Reserved."""
    cost_usd: float
    """Reserved."""


@dataclass
class _Use:
    requests: Window = field(default_factory=Window)
    tokens: Window = field(default_factory=Window)
    grants: int = 0
    reserved: int = 0
    month: str = ""
    month_tokens: int = 0
    reserved_usd: float = 0.0
    month_usd: float = 0.0


class Counter:
    """Use of all keys, over all replicas."""

    def __init__(self) -> None:
        self._uses: dict[str, _Use] = {}
        self._grants: dict[str, Grant] = {}
        self._heard: dict[str, float] = {}

    def acquire(
        self,
        grant_id: str,
        key_id: str,
        limits: Limits,
        num_tokens: int,
        replica: str,
        now: float,
        cost_usd: float = 0.0,
    ) -> Denial | None:
        """Let a request in, or say why not.

        Args:
            grant_id: chosen by the replica, to `finish` with.
            key_id: whose use it is.
            limits: the key's.
            num_tokens: estimate of prompt and completion tokens.
            replica: who asks.
            now: UTC seconds.
            cost_usd: estimate, of these tokens.
        """
        self._heard[replica] = now
        self._free_lost(now)
        use = self._use(key_id, now)
        # Larger than its whole limit it could never come in; it waits for an empty window.
        reserve = min(num_tokens, limits.tokens_per_min or num_tokens)
        if denial := _denial(use, limits, reserve, cost_usd, now):
            return denial
        use.requests.add(1, now)
        use.tokens.add(reserve, now)
        use.grants += 1
        use.reserved += reserve
        use.reserved_usd += cost_usd
        self._grants[grant_id] = Grant(
            key_id=key_id, replica=replica, at=now, num_tokens=reserve, cost_usd=cost_usd
        )
        return None

    def finish(self, grant_id: str, num_tokens: int, now: float, cost_usd: float = 0.0) -> None:
        """A request has ended and used so much; no error if it is not known (any more)."""
        grant = self._grants.pop(grant_id, None)
        if grant is None:
            return
        use = self._use(grant.key_id, now)
        use.grants -= 1
        use.reserved -= grant.num_tokens
        use.month_tokens += num_tokens
        use.month_usd += cost_usd
        # Sums of fractions: with nothing running, nothing is left over of them.
        use.reserved_usd = use.reserved_usd - grant.cost_usd if use.grants else 0.0
        extra = num_tokens - grant.num_tokens
        use.tokens.add(extra, now if extra > 0 else grant.at)

    def heartbeat(self, replica: str, now: float) -> None:
        """The replica is alive."""
        self._heard[replica] = now
        self._free_lost(now)

    def in_use(self, key_id: str) -> int:
        """Requests of the key that are being answered."""
        return self._uses[key_id].grants if key_id in self._uses else 0

    def at_least(self, month: str, spent: Mapping[str, Spent], now: float) -> None:
        """What is known from elsewhere to have been used in a month, by key."""
        for key_id, one in spent.items():
            use = self._use(key_id, now)
            if use.month == month:
                use.month_tokens = max(use.month_tokens, one.num_tokens)
                use.month_usd = max(use.month_usd, one.cost_usd)

    def _use(self, key_id: str, now: float) -> _Use:
        use = self._uses.setdefault(key_id, _Use())
        if use.month != (month := month_of(now)):
            use.month, use.month_tokens, use.month_usd = month, 0, 0.0
        return use

    def _free_lost(self, now: float) -> None:
        lost = {name for name, at in self._heard.items() if now - at > REPLICA_TIMEOUT_S}
        if not lost:
            return
        for grant_id, grant in list(self._grants.items()):
            if grant.replica in lost:
                self.finish(grant_id, grant.num_tokens, now, grant.cost_usd)
        for name in lost:
            del self._heard[name]


def _denial(use: _Use, limits: Limits, reserve: int, cost_usd: float, now: float) -> Denial | None:
    most = limits.concurrent_requests
    if most is not None and use.grants >= most:
        return _too_much(f"{most} concurrent requests", 1.0)
    most = limits.requests_per_min
    if most is not None and use.requests.total(now) >= most:
        return _too_much(f"{most} requests per minute", use.requests.wait_s(1, most, now))
    most = limits.tokens_per_min
    if most is not None and use.tokens.total(now) + reserve > most:
        return _too_much(f"{most} tokens per minute", use.tokens.wait_s(reserve, most, now))
    return _month_denial(use, limits, reserve, cost_usd, now)


def _month_denial(
    use: _Use, limits: Limits, reserve: int, cost_usd: float, now: float
) -> Denial | None:
    tokens, usd = limits.tokens_per_month, limits.usd_per_month
    if tokens is not None and use.month_tokens + use.reserved + reserve > tokens:
        return _spent(f"{tokens} tokens", now)
    if usd is not None and use.month_usd + use.reserved_usd + cost_usd > usd + ROUNDING_USD:
        return _spent(f"${usd:g}", now)
    return None


def _spent(budget: str, now: float) -> Denial:
    return Denial(
        code="insufficient_quota",
        message=f"this key's budget of {budget} is used up until the month ends (UTC)",
        retry_after_s=_end_of_month(now) - now,
    )


def _too_much(what: str, retry_after_s: float) -> Denial:
    return Denial(
        code="rate_limit_exceeded",
        message=f"this key may have {what}; try again in {math.ceil(retry_after_s)} s",
        retry_after_s=retry_after_s,
    )


def month_of(now: float) -> str:
    """The calendar month in UTC, as 2026-11."""
    return datetime.fromtimestamp(now, UTC).strftime("%Y-%m")


def _end_of_month(now: float) -> float:
    first = datetime.fromtimestamp(now, UTC).replace(
        day=1, hour=0, minute=0, second=0, microsecond=0
    )
    return (first + timedelta(days=32)).replace(day=1).timestamp()
