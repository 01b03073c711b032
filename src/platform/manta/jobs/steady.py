"""Time as it passes for a job that is watched, whoever sets the machine's clock meanwhile."""

from __future__ import annotations

import time

from manta.state import now

_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
"""Nobody can set it; on Linux it goes on while the machine sleeps."""


class Steady:
    """A clock for each of some names that was right when it was first read, and never steps."""

    def __init__(self) -> None:
        self._zero: dict[str, float] = {}

    def now(self, name: str) -> float:
        """UTC seconds by the machine's clock as it was set when `name` first asked."""
        passed_s = time.clock_gettime(_CLOCK)
        return self._zero.setdefault(name, now() - passed_s) + passed_s

    def forget(self, name: str) -> None:
        """It will not ask again."""
        self._zero.pop(name, None)
