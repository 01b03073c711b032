"""Watches a guard's requests: metrics of all of them, and traces of those that are let in."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

from manta.serving.request.exchange import SIGHT
from manta.serving.telemetry import metrics
from manta.serving.telemetry.metrics import News, Sink

if TYPE_CHECKING:
    from manta.serving.access.keys import Key
    from manta.serving.openai_errors import Refused
    from manta.serving.request.meter import Meter
    from manta.serving.telemetry.tracing import Trace, Tracer

MAX_KEYS = 100
"""Keys and models that have series of their own in one replica; the others share `other`."""
MAX_MODELS = 50
OTHER = "other"

OK = "ok"
ENGINE_ERROR = "engine_error"
BAD_REQUEST = "bad_request"
TIME_OUT = "time_out"
CLIENT_GONE = "client_gone"
SENT_ON = "sent_on"
"""A candidate answered, which tells it as its own."""
OUTCOMES = {
    "invalid_api_key": "no_key",
    "insufficient_permissions": "forbidden",
    "rate_limit_exceeded": "limit",
    "insufficient_quota": "budget",
    "overloaded": "overload",
    "request_too_large": "too_large",
    "context_length_exceeded": "too_large",
    "request_timeout": TIME_OUT,
    "timeout": TIME_OUT,
    "client_gone": CLIENT_GONE,
}
"""Code of a refusal → what it is called in metrics; other refusals are bad requests."""
GONE_STATUS = 499
"""Told for who left before there was a status, as nginx has it."""


class Sight:
    """One request, as far as it has come. Times are `time.perf_counter()`."""

    __slots__ = ("admitted_at", "began", "key", "meter", "model", "outcome", "status", "trace")

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.key: Key | None = None
        self.model = ""
        self.meter: Meter | None = None
        """None until the request is let in."""
        self.admitted_at: float | None = None
        """When it was given to the application."""
        self.status = 0
        self.outcome = ""
        self.trace: Trace | None = None

    def refused(self, refusal: Refused) -> None:
        """The guard itself answers."""
        self.status = refusal.status
        self.outcome = OUTCOMES.get(refusal.error["code"] or "", BAD_REQUEST)

    def failed(self, error: BaseException) -> None:
        """Nobody answers: Serve cancels what clients have left, anything else is the engine's."""
        gone = isinstance(error, asyncio.CancelledError)
        self.outcome = CLIENT_GONE if gone else ENGINE_ERROR
        self.status = (self.meter and self.meter.status) or (GONE_STATUS if gone else 500)

    def conclude(self) -> None:
        """The request has ended: settle its status and outcome."""
        if self.outcome or self.meter is None:
            return
        meter = self.meter
        self.status = meter.status or GONE_STATUS
        if meter.cut:
            self.outcome = TIME_OUT
        elif meter.broke:
            self.outcome = ENGINE_ERROR
        elif not meter.ended:
            self.outcome = CLIENT_GONE
        elif self.status >= 500:
            self.outcome = ENGINE_ERROR
        else:
            self.outcome = BAD_REQUEST if self.status >= 400 else OK


class Observer:
    """Counts what one guard sees. All calls come from the guard's event loop."""

    def __init__(self, sink: Sink | None = None, tracer: Tracer | None = None) -> None:
        self._sink = sink
        self._tracer = tracer
        self._news = News()
        self._in_flight: dict[str, int] = {}
        self._keys: set[str] = set()
        self._models: set[str] = set()

    @property
    def num_in_flight(self) -> int:
        """Requests that were let in and have not ended."""
        return sum(self._in_flight.values())

    def begin(self) -> Sight:
        """A request has come."""
        return Sight()

    def refused_before(self, number: int) -> None:
        """So many found no room and were refused in front of the guard."""
        self._news.count(metrics.REQUESTS, "", "", "503", "overload", amount=number)

    def let_in(
        self, scope: dict[str, Any], key: Key | None, model: str | None, meter: Meter
    ) -> None:
        """Its key and question are in order."""
        sight: Sight = scope[SIGHT]
        if self._tracer:
            sight.trace = self._tracer.begin(scope, sight)
        sight.key, sight.model, sight.meter = key, model or "", meter
        label = self._key_label(key)
        self._in_flight[label] = self._in_flight.get(label, 0) + 1

    def end(self, sight: Sight) -> None:
        """It has ended, one way or another."""
        sight.conclude()
        if sight.trace:
            sight.trace.end(sight)
        key, news = self._key_label(sight.key), self._news
        model = self._model_label(sight)
        news.count(metrics.REQUESTS, model, key, str(sight.status), sight.outcome)
        if sight.meter is None:
            return
        self._in_flight[key] -= 1
        if sight.admitted_at is None:  # its limits did not allow it
            return
        self._note_times(sight, sight.admitted_at, model, key)
        for kind, number in zip(("prompt", "completion"), sight.meter.tokens(), strict=True):
            if number:
                news.count(metrics.TOKENS, model, key, kind, amount=number)

    def _note_times(self, sight: Sight, admitted_at: float, model: str, key: str) -> None:
        news, now = self._news, time.perf_counter()
        waited = admitted_at - sight.began
        news.times_of(metrics.ADMISSION, model, key).note(waited)
        news.times_of(metrics.DURATION, model, key).note(now - sight.began)
        pace = sight.meter.pace if sight.meter else None
        if pace and pace.first_at is not None:
            ttft = pace.first_at - sight.began
            news.times_of(metrics.FIRST_TOKEN, model, key).note(ttft)
            if pace.gaps:
                news.times_of(metrics.GAP, model, key).merge(pace.gaps)

    def _key_label(self, key: Key | None) -> str:
        return "" if key is None else _bounded(key.name, self._keys, MAX_KEYS)

    def _model_label(self, sight: Sight) -> str:
        """Only names that the application has served: clients make up others."""
        if sight.outcome == OK and sight.model:
            return _bounded(sight.model, self._models, MAX_MODELS)
        return sight.model if sight.model in self._models else ""

    async def tell(self, room: int) -> None:
        """Say what is new since the last time, away from the event loop.

        Args:
            room: how many requests the guard lets in at once.
        """
        news, self._news = self._news, News()
        if self._sink is None:
            return
        news.levels[metrics.ROOM, ()] = room
        for key, number in list(self._in_flight.items()):
            news.levels[metrics.IN_FLIGHT, (key,)] = number
            if not number:
                del self._in_flight[key]
        await asyncio.to_thread(news.tell, self._sink)


def _bounded(name: str, known: set[str], most: int) -> str:
    if name in known or len(known) < most:
        known.add(name)
        return name
    return OTHER
