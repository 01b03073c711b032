"""A guarded application without an engine, for what is measured around it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from ray import serve

from manta.serving.openai_app import guarded
from manta.spec.guard import GuardConfig

EVENTS, EVENT_S = 64, 0.005
"""Of a stream, and between two of them: an engine at 200 tokens/s."""
USAGE = {"prompt_tokens": 20, "completion_tokens": EVENTS, "total_tokens": 20 + EVENTS}
ANSWER = json.dumps({"model": "m", "choices": [{"text": "a " * EVENTS}], "usage": USAGE}).encode()
EVENT = b"data: " + json.dumps({"id": "x" * 40, "choices": [{"text": "a"}]}).encode() + b"\n\n"
LAST = b"data: " + json.dumps({"choices": [], "usage": USAGE}).encode() + b"\n\n"


async def light(scope: Any, receive: Any, send: Any) -> None:
    """Answers at once, or streams EVENTS events."""
    if scope["type"] != "http":
        return
    stream = json.loads((await receive())["body"]).get("stream")
    kind = b"text/event-stream" if stream else b"application/json"
    headers = [(b"content-type", kind)]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for _ in range(EVENTS if stream else 0):
        await asyncio.sleep(EVENT_S)
        await send({"type": "http.response.body", "body": EVENT, "more_body": True})
    last = LAST + b"data: [DONE]\n\n" if stream else ANSWER
    await send({"type": "http.response.body", "body": last})


class Light:
    """What Ray makes in each replica; the ASGI application beside it answers."""


def app(args: dict[str, Any]) -> Any:
    """Build it."""
    entry = guarded(lambda: light, GuardConfig.model_validate(args["guard"]))(Light)
    return serve.deployment(entry, name="Light", max_ongoing_requests=1000).bind()
