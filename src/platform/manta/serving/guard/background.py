"""Work beside requests, in an ASGI application: begun with the first of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable

Work = Coroutine[None, None, None]


class Background:
    """Tasks that begin once, and a first look that whoever comes meanwhile waits for."""

    def __init__(self) -> None:
        self._tasks: list[asyncio.Task[None]] = []
        self._first_look: asyncio.Task[None] | None = None

    async def begin(self, look: Callable[[], Work], work: Callable[[], Iterable[Work]]) -> None:
        """Begin, unless it was, and wait until the first `look` has ended."""
        if self._first_look is None:
            self._tasks = [asyncio.create_task(one) for one in work()]
            self._first_look = asyncio.create_task(look())
        if not self._first_look.done():
            await asyncio.shield(self._first_look)

    def end(self) -> None:
        """Cancel what is left of it; it may begin again."""
        for task in self._tasks:
            task.cancel()
        self._tasks, self._first_look = [], None
