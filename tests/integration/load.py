"""Clients that ask all the time, and count what becomes of every request."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence

import httpx

RAY_WORKER_NICENESS = 15

Ask = Callable[[httpx.AsyncClient], Awaitable[str]]
"""Sends one request; what to count its good answer as. Raises Failed, Wrong or httpx's errors."""


class Failed(Exception):
    """The request was not answered, and the client knows it."""


class Wrong(Exception):
    """An answer that looks good and is not what was asked for."""


class Load:
    """One client for each of `asks`, which repeats it in a closed loop while the block runs.

    Args:
        asks: what each client asks.
        retries: how often a request that failed is sent again; it then counts once.
        back_off_s: before that.
        deadline_s: for one attempt; one that has no end by then hangs.
        headers: of each request.
        pause_s: of each client between its requests.
    """

    def __init__(
        self,
        asks: Sequence[Ask],
        *,
        retries: int = 0,
        back_off_s: float = 0,
        deadline_s: float = 30,
        headers: dict[str, str] | None = None,
        pause_s: float = 0,
    ) -> None:
        self.answers: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()
        """By what was last said, retries included."""
        self.wrong: list[str] = []
        self.num_hung = 0
        self.retried: Counter[str] = Counter()
        self.longest_gap_s = 0.0
        """Without any good answer."""
        self._asks, self._retries, self._deadline_s = asks, retries, deadline_s
        self._headers, self._pause_s, self._back_off_s = headers or {}, pause_s, back_off_s
        self._last = time.monotonic()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._work)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    @property
    def num_requests(self) -> int:
        return sum(self.answers.values()) + sum(self.failures.values())

    @property
    def share_good(self) -> float:
        return sum(self.answers.values()) / max(1, self.num_requests)

    def __str__(self) -> str:
        return (
            f"{self.num_requests} requests {dict(self.answers)}; failed {dict(self.failures)}, "
            f"wrong {len(self.wrong)}, hung {self.num_hung}, sent again {dict(self.retried)}; "
            f"{self.share_good:.2%} good; longest without an answer {self.longest_gap_s:.1f} s"
        )

    def _work(self) -> None:
        # As nice as Ray's workers, or it would leave them too little of the cores to recover on.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), RAY_WORKER_NICENESS)
        asyncio.run(self._run())

    async def _run(self) -> None:
        timeout, limits = httpx.Timeout(None), httpx.Limits(max_connections=None)
        self._last = time.monotonic()
        async with httpx.AsyncClient(
            timeout=timeout, limits=limits, headers=self._headers, trust_env=False
        ) as client:
            await asyncio.gather(*(self._client(client, ask) for ask in self._asks))

    async def _client(self, client: httpx.AsyncClient, ask: Ask) -> None:
        while not self._done.is_set():
            await self._one(client, ask)
            await asyncio.sleep(self._pause_s)

    async def _one(self, client: httpx.AsyncClient, ask: Ask) -> None:
        for left in range(self._retries, -1, -1):
            try:
                async with asyncio.timeout(self._deadline_s):
                    label = await ask(client)
            except TimeoutError:
                self.num_hung += 1
                why = "no end in time"
            except (httpx.HTTPError, Failed) as error:
                why = f"{type(error).__name__}: {error}"[:80]
            except Wrong as error:
                self.wrong.append(str(error))
                why = "wrong"
            else:
                self.answers[label] += 1
                now = time.monotonic()
                self.longest_gap_s = max(self.longest_gap_s, now - self._last)
                self._last = now
                return
            (self.retried if left else self.failures)[why] += 1
            await asyncio.sleep(self._back_off_s)


def get(url: str, **params: object) -> Ask:
    """A plain GET; its text is what it counts as."""

    async def ask(client: httpx.AsyncClient) -> str:
        answer = await client.get(url, params={k: str(v) for k, v in params.items()})
        if answer.status_code != 200:
            raise Failed(str(answer.status_code))
        return answer.text

    return ask


def stream(url: str, model: str, num_tokens: int = 64) -> Ask:
    """A streamed completion; counted as the running version's or a candidate's.

    It is Wrong if its end or its use is missing.
    """
    asked = {"model": model, "prompt": "import", "max_tokens": num_tokens, "ignore_eos": True}
    body = {**asked, "stream": True, "stream_options": {"include_usage": True}}

    async def ask(client: httpx.AsyncClient) -> str:
        async with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                raise Failed(str(answer.status_code))
            lines = [line async for line in answer.aiter_lines() if line]
            if lines[-1] != "data: [DONE]" or f'"completion_tokens":{num_tokens}' not in lines[-2]:
                raise Wrong(lines[-1])
            return answer.headers.get("x-manta-version", "running")

    return ask
