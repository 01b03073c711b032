"""A guarded application whose answer to each question can be told from every other."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from ray import serve

from manta.serving.openai_app import guarded
from manta.spec.guard import GuardConfig

EVENT_S = 0.01

api = FastAPI()


def answer_to(prompt: str) -> str:
    return hashlib.sha256(prompt.encode()).hexdigest()


def pieces(prompt: str) -> list[str]:
    text = answer_to(prompt)
    return [text[i : i + 4] for i in range(0, len(text), 4)]


class Echo:
    """Whole at once, or streamed in 16 events; late once its replica was told so."""

    def __init__(self) -> None:
        self.wait_s = 0.0

    @api.post("/v1/completions")
    async def complete(self, request: Request) -> Any:
        body = await request.json()
        await asyncio.sleep(self.wait_s)
        if body.get("stream"):
            return StreamingResponse(events(body["prompt"]), media_type="text/event-stream")
        return {"choices": [{"text": answer_to(body["prompt"])}]}

    @api.post("/slow")
    async def slow(self, request: Request) -> dict[str, int]:
        """From now on this replica is slow."""
        self.wait_s = float((await request.json())["wait_s"])
        return {"pid": os.getpid()}


async def events(prompt: str) -> AsyncIterator[str]:
    for text in pieces(prompt):
        await asyncio.sleep(EVENT_S)
        yield f"data: {json.dumps({'choices': [{'text': text}]})}\n\n"
    yield "data: [DONE]\n\n"


def app(args: dict[str, Any]) -> Any:
    config = GuardConfig.model_validate(args.get("guard") or {})
    return serve.deployment(guarded(api, config)(Echo)).bind()
