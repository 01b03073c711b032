"""Leaves out a target that does not answer, so that it costs nothing per request.

Pure, with time given from outside. Closed: asked as usual. Open after so many failures in a row:
left out. Half open when its pause is over: one request tries it, and what comes of that decides.
"""

from __future__ import annotations

from manta.spec.gateway import BreakerConfig


class Breaker:
    """Of one target. Times are seconds of any clock that does not go back."""

    def __init__(self, config: BreakerConfig) -> None:
        self._config = config
        self._num_failures = 0
        self._until: float | None = None
        """When its pause is over; None if it is closed."""
        self._is_tried = False

    def may_try(self, now: float) -> bool:
        """Whether a request may go there."""
        return self._until is None or (now >= self._until and not self._is_tried)

    def begin(self) -> None:
        """A request that may goes there; one of the three below follows."""
        self._is_tried = self._until is not None

    def answered(self) -> None:
        """An answer has begun."""
        self._num_failures, self._until, self._is_tried = 0, None, False

    def failed(self, now: float) -> None:
        """There was none, or it broke off."""
        self._num_failures += 1
        if self._is_tried or (self._until is None and self._num_failures >= self._config.failures):
            self._until, self._is_tried = now + self._config.pause_s, False

    def undecided(self) -> None:
        """The client went away before that was known, or the failure was not the target's."""
        self._is_tried = False

    def is_open(self) -> bool:
        """Whether it is left out, or tried by one request only."""
        return self._until is not None

    def pause_s(self, now: float) -> float:
        """For how long it is still left out."""
        return max(0.0, self._until - now) if self._until is not None else 0.0
