"""A small server with OpenAI's API that stands for a model outside: it counts words as tokens.

Its answer says how often it was asked, so that an answer of before is told from a new one.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, Field


class StreamOptions(BaseModel):
    include_usage: bool | None = False


class Asked(BaseModel):
    model: str = "m"
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1, le=8)] | None = 1
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    user: str | None = None


class Part(BaseModel):
    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: dict[str, str] | None = None


class Said(BaseModel):
    role: Literal["system", "user", "assistant"]
    content: str | list[Part]


class Chat(Asked):
    messages: Annotated[list[Said], Field(min_length=1)]


class Completion(Asked):
    prompt: str | list[str] | list[int]


class Inputs(BaseModel):
    model: str = "m"
    input: str | list[str]


class ModelServer:
    """Answers `WORDS`, in a stream word by word."""

    def __init__(self, words: str = "all of them , thank you") -> None:
        self.words = words
        self.models = ["m"]
        self.asked: list[dict[str, Any]] = []
        self.hold = asyncio.Event()
        self.hold.set()
        self.pause_s = 0.0
        """Between the words of a stream."""
        self.fault: str | None = None
        """What goes wrong: `status`, `event`, `cut` or `abort`."""
        self.num_running = 0
        self.app = FastAPI(title="a model")
        self.app.post("/v1/chat/completions")(self.chat)
        self.app.post("/v1/completions")(self.complete)
        self.app.post("/v1/embeddings")(self.embed)
        self.app.get("/v1/models")(self.list)
        self.app.post("/v1/load_lora_adapter")(self.load)

    def list(self) -> dict[str, Any]:
        return {"object": "list", "data": [{"id": n, "object": "model"} for n in self.models]}

    def load(self) -> dict[str, str]:
        return {"status": "loaded"}

    async def chat(self, asked: Chat) -> Response:
        return await self.answer(asked, "message")

    async def complete(self, asked: Completion) -> Response:
        return await self.answer(asked, "text")

    async def embed(self, asked: Inputs) -> Response:
        self.asked.append(asked.model_dump())
        data = [{"index": 0, "embedding": [0.5, float(len(self.asked))]}]
        return JSONResponse({"data": data, "usage": {"prompt_tokens": 4, "total_tokens": 4}})

    async def answer(self, asked: Asked, kind: str) -> Response:
        self.asked.append(asked.model_dump())
        headers = {"x-request-id": f"r{len(self.asked)}", "x-served-by": "m"}
        if asked.stream:
            events = self.events(asked, kind)
            return StreamingResponse(events, media_type="text/event-stream", headers=headers)
        await self.hold.wait()
        if self.fault == "status":
            return JSONResponse({"error": {"message": "no"}}, 500)
        text = f"{self.words} {len(self.asked)}"
        reason = "abort" if self.fault == "abort" else "stop"
        said = {"text": text} if kind == "text" else {"message": {"content": text}}
        choice = {"index": 0, "finish_reason": reason, **said}
        return JSONResponse({"choices": [choice], "usage": self.usage(asked)}, headers=headers)

    async def events(self, asked: Asked, kind: str) -> AsyncIterator[str]:
        self.num_running += 1
        try:
            for word in [*self.words.split(), str(len(self.asked))]:
                said = (
                    {"text": f"{word} "} if kind == "text" else {"delta": {"content": f"{word} "}}
                )
                yield event({"choices": [{"index": 0, **said}]})
                await asyncio.sleep(self.pause_s)
                await self.hold.wait()
            if self.fault == "cut":
                raise ConnectionError("the engine is gone")
            if self.fault == "event":
                yield event({"error": {"message": "the engine is gone"}})
            if asked.stream_options and asked.stream_options.include_usage:
                yield event({"choices": [], "usage": self.usage(asked)})
            yield "data: [DONE]\n\n"
        finally:
            self.num_running -= 1

    def usage(self, asked: Asked) -> dict[str, int]:
        completion = len(self.words.split()) + 1
        return {"prompt_tokens": 7, "completion_tokens": completion}


def event(value: object) -> str:
    return f"data: {json.dumps(value)}\n\n"
