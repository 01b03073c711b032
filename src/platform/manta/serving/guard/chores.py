"""What a guard does beside requests: looks for keys, writes use, tells metrics, compares."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from manta.serving.access.key_store import KeyTable
from manta.serving.access.usage import Ledger
from manta.serving.canary.splitter import Splitter
from manta.serving.guard.background import Background, Work
from manta.serving.guard.cache import ResponseCache
from manta.serving.guard.limiter import Limiter
from manta.serving.guard.prompt_log import PromptLog
from manta.serving.guard.slowness import Judge, Waits
from manta.serving.telemetry.observer import Observer
from manta.serving.telemetry.vitals import VitalsWriter
from manta.spec.guard import GuardConfig

POLL_S = 1.0
"""Between looks at the key store: with the time of a look, the delay of a revocation."""
FLUSH_S = 2.0
"""Between writes of use."""
TELL_S = 5.0
"""Between tellings of metrics; Ray passes them on every 10 s."""

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Chores:
    """The background work of one guard. Whatever fails in it, serving goes on."""

    config: GuardConfig
    room: int
    """How many requests the guard lets in at once."""
    application: str
    table: KeyTable
    limiter: Limiter
    ledger: Ledger
    prompts: PromptLog
    observer: Observer
    vitals: VitalsWriter | None
    cache: ResponseCache | None
    split: Splitter | None
    waits: Waits = field(default_factory=Waits)
    judge: Judge = field(default_factory=Judge)
    _background: Background = field(default_factory=Background)

    async def start(self) -> None:
        """Begin, once, and wait until the keys were looked at."""
        await self._background.begin(self._look, self._work)

    def _work(self) -> Iterator[Work]:
        yield self._report()
        yield self._tell_often()
        if self.config.keys == "required":
            yield self._watch_keys()
        if self.config.replace_slow_replicas:
            yield self._compare()
        if self.split:
            yield self.split.watch()

    async def stop(self) -> None:
        """End it, and write what is not yet written."""
        self._background.end()
        if self.split:
            await self.split.stop()
        await self._tell()
        await asyncio.to_thread(self._flush, last=True)

    async def _look(self) -> None:
        if self.config.keys == "required":
            await asyncio.gather(asyncio.to_thread(self.table.refresh), self.limiter.start())

    async def _watch_keys(self) -> None:
        while True:
            await asyncio.sleep(POLL_S)
            await asyncio.to_thread(self.table.refresh)

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_S)
            self.limiter.heartbeat()
            if self.cache:
                self.cache.sweep()
            await asyncio.to_thread(self._flush)

    async def _compare(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_S)
            others_s: list[float] = []
            if (own_s := self.waits.median_s(time.monotonic())) is not None:
                others_s = await self.limiter.compare(self.application, own_s)
            self.judge.hear(own_s, others_s, time.monotonic())

    async def _tell_often(self) -> None:
        while True:
            await asyncio.sleep(TELL_S)
            await self._tell()

    async def _tell(self) -> None:
        try:
            await self.observer.tell(self.room)
        except Exception as error:  # whatever Ray raises: serving must go on
            logger.warning("metrics cannot be told: %r", error)

    def _flush(self, *, last: bool = False) -> None:
        for what, write in (
            ("use", self.ledger.flush),
            ("prompts", lambda: self.prompts.work(last=last)),
            ("vitals", self.vitals.flush if self.vitals else lambda: None),
        ):
            try:
                write()
            except Exception as error:  # whatever a storage client raises: serving must go on
                logger.warning("%s cannot be written, will try again: %s", what, error)
