"""Between the guard and vLLM's application: adapters as models, and errors in OpenAI's words.

vLLM answers unknown routes, and those that the model's task does not have, as FastAPI does
(`{"detail": …}`); clients of OpenAI's API look for `error`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from typing import Any

from manta.serving.access.keys import USER_ROUTES
from manta.serving.engine import request_faults
from manta.serving.engine.adapters import Adapters
from manta.serving.guard.guard import App
from manta.serving.openai_errors import Message, Refused, Send, bad_request
from manta.serving.request.exchange import MODEL, Receive, Scope, path_of

MODELS = "/v1/models"


class EngineApp:
    """An ASGI application around the engine's own."""

    def __init__(
        self,
        app: App,
        adapters: Adapters | None = None,
        before: Callable[[], None] = lambda: None,
    ) -> None:
        self.app = app
        self._adapters = adapters
        self._before = before
        """Called with each request, in its task."""

    def add_exception_handler(self, *arguments: Any) -> None:
        """Ray Serve teaches FastAPI applications its own exceptions this way."""
        if hasattr(self.app, "add_exception_handler"):
            self.app.add_exception_handler(*arguments)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, as ASGI has it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        self._before()
        progress = request_faults.begin()
        path = path_of(scope)
        try:
            if self._adapters and scope["method"] == "GET" and path.startswith(MODELS):
                await self._models(path, scope, receive, send)
            else:
                async with self._adapter(scope.get(MODEL)):
                    await self.app(scope, receive, _Reworded(send, path).send)
        except Refused as refusal:  # answered here, so that the guard counts it as any answer
            await refusal.send(send)
        except Exception:
            if not progress.is_refused:  # Starlette raises what it has answered once more
                raise

    def _adapter(self, model: str | None) -> contextlib.AbstractAsyncContextManager[object]:
        if self._adapters and model and self._adapters.is_mine(model):
            return self._adapters.using(model)
        return contextlib.nullcontext()

    async def _models(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        """The engine's list knows what is loaded; this one knows what there is."""
        adapters = self._adapters
        assert adapters is not None
        names = await adapters.models()
        asked = path.removeprefix(MODELS).removeprefix("/")
        base = adapters.base

        def listed(status: int, body: bytes) -> bytes:
            cards = [c for c in json.loads(body)["data"] if not adapters.is_mine(c["id"])]
            (parent,) = [card for card in cards if card["id"] == base]
            cards += [{**parent, "id": one, "root": one, "parent": base} for one in names]
            if not asked:
                return json.dumps({"object": "list", "data": cards}).encode()
            return json.dumps(next(card for card in cards if card["id"] == asked)).encode()

        if not asked or asked in names:
            whole = {**scope, "path": scope["path"].removesuffix(path) + MODELS}
            await self.app(
                whole, receive, _Edited(send, lambda status: status == 200, listed).send
            )
        else:
            await self.app(scope, receive, _Reworded(send, path).send)


class _Edited:
    """Holds an answer back that is to be changed as a whole, and passes others on as they come."""

    def __init__(
        self,
        send: Send,
        wanted: Callable[[int], bool],
        edit: Callable[[int, bytes], bytes],
    ) -> None:
        self._send = send
        self._wanted = wanted
        self._edit = edit
        self._start: Message | None = None
        self._body = b""

    async def send(self, message: Message) -> None:
        """What the application calls in place of the server's own `send`."""
        if message["type"] == "http.response.start" and self._wanted(message["status"]):
            self._start = message
        elif self._start is None:
            await self._send(message)
        elif message["type"] == "http.response.body":
            self._body += message.get("body", b"")
            if not message.get("more_body", False):
                await self._finish(self._start)

    def _status(self, status: int) -> int:
        return status

    async def _finish(self, start: Message) -> None:
        body = self._edit(start["status"], self._body)
        kept = [h for h in start.get("headers", ()) if h[0].lower() != b"content-length"]
        headers = [*kept, (b"content-length", str(len(body)).encode())]
        status = self._status(start["status"])
        await self._send({**start, "status": status, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})


class _Reworded(_Edited):
    """Errors that are not in OpenAI's words, and the 501 of what vLLM does not support (yet)."""

    def __init__(self, send: Send, path: str) -> None:
        super().__init__(send, lambda status: status >= 400, self._reword)
        self._path = path

    def _status(self, status: int) -> int:
        return 400 if status == 501 else status  # no failure, for alarms to count

    def _reword(self, status: int, body: bytes) -> bytes:
        if status == 404 and self._path.startswith(f"{MODELS}/"):
            name = self._path.removeprefix(f"{MODELS}/")[:200]
            what = f"The model `{name}` does not exist."
            return Refused(404, "model_not_found", what, param="model").body()
        if status == 501:
            with contextlib.suppress(ValueError, TypeError, KeyError):
                what = str(json.loads(body)["error"]["message"])
                return bad_request(what[:1000], code="not_supported").body()
        try:
            detail = json.loads(body)["detail"]
        except (ValueError, TypeError, KeyError):
            return body
        if status == 404 and self._path in USER_ROUTES:
            what = f"the model that is served here cannot answer {self._path}"
            return Refused(404, "not_served", what).body()
        text = detail if isinstance(detail, str) else json.dumps(detail)
        return bad_request(
            text[:1000], code="not_found" if status == 404 else "invalid_value"
        ).body()
