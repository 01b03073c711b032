"""A replica that is wrongly slow is found by its siblings, and lets itself be replaced.

Serve's health checks ask whether a replica answers, not how fast. So each guard tells the actor
that counts limits (limiter.py) how long its requests wait for their first byte, and hears how
those of the application's other replicas fare. One that has been far slower for a while fails its
health check; HAProxy then passes it by, and Serve replaces it.
"""

from __future__ import annotations

import logging
import statistics
from collections import deque
from collections.abc import Sequence
from typing import Protocol

WINDOW_S = 20.0
"""What is told is the median over this time."""
PATIENCE_S = 20.0
"""How long it has to be slow without a break: bursts and long prompts pass."""
MIN_REQUESTS = 5
"""Of the window; fewer say nothing."""
RATIO, MIN_EXTRA_S = 5.0, 0.5
"""Slow is who waits so many times, and so much, longer than most of the others."""
STALE_S = 10.0
"""What a replica told is forgotten then: it has ended, or is asked by nobody."""

logger = logging.getLogger(__name__)


class Answer(Protocol):
    """A request's answer as far as it has come; see Meter."""

    first_byte_s: float | None


class Waits:
    """How long one replica's requests wait for the first byte of their answer."""

    def __init__(self) -> None:
        self._ended: deque[tuple[float, float]] = deque(maxlen=1000)
        self._open: dict[Answer, float] = {}

    def begin(self, answer: Answer, now: float) -> None:
        """A request goes to the application."""
        self._open[answer] = now

    def end(self, answer: Answer, now: float) -> None:
        """It has ended, with or without an answer; none that did not begin counts."""
        began = self._open.pop(answer, None)
        if began is not None:
            first_byte_s = answer.first_byte_s
            self._ended.append((now, now - began if first_byte_s is None else first_byte_s))

    def median_s(self, now: float) -> float | None:
        """Of the window, and of what is open; None of too few.

        One that still waits counts with its wait so far, if that is longer than any that ended: a
        replica that hangs ends none.
        """
        while self._ended and self._ended[0][0] < now - WINDOW_S:
            self._ended.popleft()
        waits = [wait for _, wait in self._ended]
        waits += [a.first_byte_s for a in self._open if a.first_byte_s is not None]
        longest = max(waits, default=0.0)
        silent = [now - began for a, began in self._open.items() if a.first_byte_s is None]
        waits += [wait for wait in silent if wait > longest]
        return statistics.median(waits) if len(waits) >= MIN_REQUESTS else None


def is_slow(own_s: float, others_s: Sequence[float]) -> bool:
    """Whether a replica is far slower than its siblings. Pure.

    Compared is with the upper median of the others, so that of two or three replicas at most one
    is slow, of more at most half, and the fastest never.
    """
    if not others_s:
        return False
    usual_s = statistics.median_high(others_s)
    return own_s > RATIO * usual_s and own_s > usual_s + MIN_EXTRA_S


class Board:
    """What each replica of each application told last."""

    def __init__(self) -> None:
        self._told: dict[str, dict[str, tuple[float, float]]] = {}

    def tell(self, application: str, replica: str, median_s: float, now: float) -> list[float]:
        """Note one replica's median; the others' that were told lately."""
        told = self._told.setdefault(application, {})
        told[replica] = (now, median_s)
        for name in [name for name, (at, _) in told.items() if at < now - STALE_S]:
            del told[name]
        return [value for name, (_, value) in told.items() if name != replica]


class Judge:
    """Whether this replica is to be replaced, by one look after the other."""

    def __init__(self) -> None:
        self._since: float | None = None
        self.is_slow = False
        """Stays so: one that gets no more requests would seem to be well again."""

    def hear(self, own_s: float | None, others_s: Sequence[float], now: float) -> None:
        """How it and the others fare now."""
        if own_s is None or not is_slow(own_s, others_s):
            self._since = None
        elif self._since is None:
            self._since = now
        elif now - self._since >= PATIENCE_S and not self.is_slow:
            self.is_slow = True
            logger.error("first bytes after %.1f s, the others': %s", own_s, others_s)
