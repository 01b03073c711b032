"""An HTTP request as ASGI tells it: route, key, body, and what the application sees of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from manta.serving.openai_errors import Message, Refused

Receive = Callable[[], Awaitable[Message]]
Scope = dict[str, Any]

MODEL = "manta.model"
"""Where a scope holds the model that the body names, for the application behind the guard."""
SIGHT = "manta.sight"
"""Where a scope holds what the guard's observer has seen of the request."""


def too_large(most: int) -> Refused:
    """What a body over `most` bytes gets."""
    return Refused(413, "request_too_large", f"the body may have {most} bytes")


async def read_body(receive: Receive, most: int) -> bytes:
    """The whole body. Raises Refused if it is over `most` bytes, or cut short."""
    parts, num_bytes = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Refused(400, "client_gone", "the request was cut short")
        parts.append(message.get("body", b""))
        num_bytes += len(parts[-1])
        if num_bytes > most:
            raise too_large(most)
        if not message.get("more_body", False):
            return b"".join(parts)


def again(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body once more, and after it what the client does."""
    given = False

    async def receive_again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_again


def inner(scope: Scope, body: bytes) -> Scope:
    """The request as the application sees it: without the key, which it has no use for."""
    headers = [
        (name, value)
        for name, value in scope["headers"]
        if name.lower() not in (b"authorization", b"content-length", b"transfer-encoding")
    ]
    if body:
        headers.append((b"content-length", str(len(body)).encode()))
    if trace := scope[SIGHT].trace:
        headers = trace.passed_on(headers)
    return {**scope, "headers": headers}


def path_of(scope: Scope) -> str:
    """The route as the application knows it, without the prefix that Serve gave it."""
    path, root = str(scope["path"]), str(scope.get("root_path", "")).rstrip("/")
    inside = root and (path == root or path.startswith(root + "/"))
    return path[len(root) :] or "/" if inside else path


def secret_of(scope: Scope) -> bytes | None:
    """The key that the request shows; None if it shows none."""
    value = header_of(scope, b"authorization")
    scheme, _, secret = (value or b"").partition(b" ")
    return secret.strip() if scheme.lower() == b"bearer" and secret.strip() else None


def header_of(scope: Scope, name: bytes) -> bytes | None:
    """The header's value; None if it is not there, or more than once."""
    found = [value for key, value in scope["headers"] if key.lower() == name]
    return bytes(found[0]) if len(found) == 1 else None
