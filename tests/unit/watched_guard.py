"""A guard that is watched, around an application which does as it is told; for tests."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

from manta.serving.access import key_store, keys
from manta.serving.access.usage import Ledger
from manta.serving.guard.guard import Guard
from manta.serving.guard.limiter import LocalLimiter
from manta.serving.telemetry.metrics import Metric
from manta.serving.telemetry.observer import Observer
from manta.serving.telemetry.tracing import Tracer
from manta.spec.guard import GuardConfig, Limits

CHAT = "/v1/chat/completions"
USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
Send = Callable[[dict[str, Any]], Awaitable[None]]


class Numbers:
    """What a metrics server would show, by name and labels."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}

    def add(self, metric: Metric, labels: Mapping[str, str], amount: float) -> None:
        assert metric.kind == "counter"
        assert amount >= 0
        at = self._at(metric, labels)
        self.values[at] = self.values.get(at, 0) + amount

    def set(self, metric: Metric, labels: Mapping[str, str], value: float) -> None:
        assert metric.kind == "gauge"
        self.values[self._at(metric, labels)] = value

    def get(self, name: str, **labels: str) -> float:
        """The sum over all series of that name with these labels."""
        wanted = labels.items()
        return sum(v for (n, has), v in self.values.items() if n == name and wanted <= has)

    def label(self, name: str) -> set[str]:
        """Every value that a label has."""
        return {value for _, labels in self.values for key, value in labels if key == name}

    @staticmethod
    def _at(metric: Metric, labels: Mapping[str, str]) -> tuple[str, frozenset[tuple[str, str]]]:
        assert tuple(labels) == metric.labels
        return metric.exported, frozenset(labels.items())


class Engine:
    """Answers each request by the script that its body names."""

    def __init__(self) -> None:
        self.hold = asyncio.Event()
        self.headers: list[dict[bytes, bytes]] = []

    async def __call__(self, scope: Any, receive: Any, send: Send) -> None:
        data = (await receive()).get("body") or b"{}"
        self.headers.append(dict(scope["headers"]))
        script = json.loads(data).get("user", "answer")
        await getattr(self, script)(send)

    async def answer(self, send: Send, status: int = 200) -> None:
        body = json.dumps({"choices": [{"text": "x"}], "usage": USAGE}).encode()
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def unknown_model(self, send: Send) -> None:
        await self.answer(send, 404)

    async def broken(self, send: Send) -> None:
        await self.answer(send, 500)

    async def crash(self, send: Send) -> None:
        raise RuntimeError("an engine that raises")

    async def silent(self, send: Send) -> None:
        await self.hold.wait()
        await self.answer(send)

    async def cut_short(self, send: Send) -> None:
        """As applications do that notice that their client has gone."""
        await self._begin(send)
        await self._event(send, token("a"))

    async def stream_fails(self, send: Send) -> None:
        await self._begin(send)
        await self._event(send, token("a"))
        await self._event(send, {"error": {"message": "no memory", "code": 500}})
        await self._end(send)

    async def stream(self, send: Send) -> None:
        """Three tokens, 20 ms and 60 ms apart, in the messages that vLLM sends for a chat."""
        await self._begin(send)
        opening = {"choices": [{"delta": {"role": "assistant", "content": ""}}]}
        await self._event(send, opening)
        for pause_s in (0.0, 0.02, 0.06):
            await asyncio.sleep(pause_s)
            await self._event(send, token("a"))
        await self._event(send, {"choices": [], "usage": USAGE})
        await self._end(send)

    async def _begin(self, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

    async def _event(self, send: Send, value: object) -> None:
        data = json.dumps(value, separators=(",", ":"))
        data = data.replace('{"error":', '{"error": ')  # vLLM's errors come from json.dumps
        body = f"data: {data}\n\n".encode()
        await send({"type": "http.response.body", "body": body, "more_body": True})

    async def _end(self, send: Send) -> None:
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


def token(text: str) -> dict[str, Any]:
    return {"choices": [{"delta": {"content": text}}]}


class Watched:
    """A guarded engine, and what is told of it."""

    def __init__(self, root: Path, config: GuardConfig, tracer: Tracer | None = None) -> None:
        self.root, self.config = str(root), config
        self.engine, self.numbers = Engine(), Numbers()
        self.observer = Observer(self.numbers, tracer)
        self.guard = Guard(
            self.engine,
            config,
            key_store.KeyTable(self.root),
            LocalLimiter("replica"),
            Ledger(self.root, {}),
            observer=self.observer,
        )

    def key(self, name: str = "team-a", **limits: int) -> str:
        key, secret = keys.make(name=name, owner="me", now=time.time(), limits=Limits(**limits))
        key_store.save(self.root, key)
        return secret

    async def ask(
        self, secret: str, script: str = "answer", *, model: str = "m", **headers: str
    ) -> httpx.Response:
        transport = httpx.ASGITransport(self.guard, raise_app_exceptions=False)
        stream = script in ("stream", "stream_fails", "cut_short")
        body = {"model": model, "user": script, "stream": stream, "messages": []}
        headers = {"authorization": f"Bearer {secret}"} | headers
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return await client.post(CHAT, json=body, headers=headers)


@asynccontextmanager
async def watched(
    root: Path, tracer: Tracer | None = None, **config: Any
) -> AsyncIterator[Watched]:
    here = Watched(root, GuardConfig(**config), tracer)
    try:
        yield here
    finally:
        await here.guard.stop()
