"""When an answer came, and how evenly: what a client feels of a stream."""

from __future__ import annotations

import bisect
import time

ITL_BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class Distribution:
    """How often values fell between bounds, with their exact sum."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        """By bucket; a bound belongs to the bucket below it, the last bucket has no end."""
        self.total = 0.0

    def note(self, value: float) -> None:
        """Add one value."""
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.total += value

    def merge(self, other: Distribution) -> None:
        """Add all values of one with the same bounds."""
        self.counts = [a + b for a, b in zip(self.counts, other.counts, strict=True)]
        self.total += other.total


class Pace:
    """The times of one stream's messages, in constant memory."""

    __slots__ = ("_last", "first_at", "gaps")

    def __init__(self) -> None:
        self.first_at: float | None = None
        """`time.perf_counter()` at the first event; None before it, and of whole answers."""
        self.gaps: Distribution | None = None
        """Seconds between messages that carry tokens; None before there are two."""
        self._last: float | None = None

    def note(self, body: bytes) -> None:
        """A message of the stream with something of the answer in it has come.

        Engines send one for each step. The one that opens a chat holds no token, and comes
        together with the first.
        """
        now = time.perf_counter()
        if self.first_at is None:
            self.first_at = now
            self._last = None if b'"content":""' in body else now
            return
        last, self._last = self._last, now
        if last is not None:
            if self.gaps is None:
                self.gaps = Distribution(ITL_BOUNDS_S)
            self.gaps.note(now - last)
