"""Time as it passes for a job that is watched, whoever sets the machine's clock meanwhile."""

from __future__ import annotations

import time

from manta.state import now

_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
"""Nobody can set it; on Linux it goes on while the machine sleeps."""


class Steady:
    """A clock for each of some names that was right when it was first read, and never steps."""

    def __init__(self) -> None:
        self._begun: dict[str, tuple[float, float]] = {}

    def now(self, name: str) -> float:
        """UTC seconds by the machine's clock as it was set when `name` first asked."""
        passed_s = time.clock_gettime(_CLOCK)
        at, passed_then_s = self._begun.setdefault(name, (now(), passed_s))
        return at + passed_s - passed_then_s

    def since(self, name: str, at: float) -> float:
        """When what was written down as `at` began: not after `name` first asked.

        Only a clock that was put back since can have told a later time.
        """
        self.now(name)
        return min(at, self._begun[name][0])

    def forget(self, name: str) -> None:
        """It will not ask again."""
        self._begun.pop(name, None)
