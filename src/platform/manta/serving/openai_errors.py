"""Refusals, as OpenAI's API words them, so that its clients raise their own exceptions."""

from __future__ import annotations

import json
import math
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]


class Refused(Exception):
    """A request that is answered here and goes no further."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(code)  # never the message, which may repeat what the client sent
        self.status = status
        self.retry_after_s = retry_after_s
        self.error = {"message": message, "type": kind, "param": param, "code": code}

    def body(self) -> bytes:
        """The error as OpenAI has it."""
        return json.dumps({"error": self.error}).encode()

    async def send(self, send: Send) -> None:
        """Answer with it."""
        body = self.body()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
        ]
        if self.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        if self.retry_after_s is not None:
            seconds = max(1, math.ceil(self.retry_after_s))
            headers.append((b"retry-after", str(seconds).encode()))
        start = {"type": "http.response.start", "status": self.status, "headers": headers}
        await send(start)
        await send({"type": "http.response.body", "body": body})


def bad_request(message: str, param: str | None = None, code: str = "invalid_value") -> Refused:
    """400."""
    return Refused(400, code, message, param=param)


def no_key(message: str) -> Refused:
    """401."""
    return Refused(401, "invalid_api_key", message)


def not_allowed(message: str, param: str | None = None) -> Refused:
    """403."""
    return Refused(403, "insufficient_permissions", message, param=param)


def overloaded(message: str, retry_after_s: float = 1.0) -> Refused:
    """503, of a server that is there and has no room."""
    return Refused(503, "overloaded", message, kind="server_error", retry_after_s=retry_after_s)
