"""Small guarded applications behind the gateway, and clients that ask all the time and count."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from typing import Any

import httpx

SOURCE = """
import asyncio, json, os
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from ray import serve
from manta import storage
from manta.serving.guard.ingress import guarded_class
from manta.spec.guard import GuardConfig

api = FastAPI()
NUM_WORDS = 5

class Talker:
    @api.post("/v1/completions")
    async def answer(self, request: Request) -> Response:
        asked = await request.json()
        headers = {"x-pid": str(os.getpid())}
        if asked.get("stream"):
            words = events(asked["model"], asked.get("max_tokens", NUM_WORDS))
            return StreamingResponse(words, headers=headers, media_type="text/event-stream")
        await asyncio.sleep(0.1)
        return JSONResponse({"model": asked["model"], "choices": []}, headers=headers)

async def events(model, num):
    for n in range(num):
        said = {"model": model, "choices": [{"text": str(n)}]}
        yield f"data: {json.dumps(said)}\\n\\n"
        await asyncio.sleep(0.02)
    yield "data: [DONE]\\n\\n"

def app(args):
    ingress = serve.ingress(api)(guarded_class(Talker, GuardConfig(), storage.root()))
    return serve.deployment(ingress, ray_actor_options={"num_cpus": 0.1}).bind()
"""


def app(name: str) -> dict[str, Any]:
    return {"name": name, "route_prefix": f"/{name}", "import_path": "talkers_app:app"}


class Load:
    """Clients in a closed loop that ask for `model`, without retrying."""

    def __init__(self, url: str, key: str, model: str, *, streams: bool) -> None:
        self.url, self.model, self.streams = url, model, streams
        self.headers = {"authorization": f"Bearer {key}"}
        self.served_by: Counter[str] = Counter()
        self.pids: dict[str, int] = {}
        """Of the replica that answered last, by application."""
        self.failures: list[str] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._ask()))

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    async def _ask(self) -> None:
        async with httpx.AsyncClient(timeout=30, headers=self.headers) as client:
            kinds = [False, True] * 3 if self.streams else [False] * 6
            await asyncio.gather(*(self._client(client, stream) for stream in kinds))

    async def _client(self, client: httpx.AsyncClient, stream: bool) -> None:
        while not self._done.is_set():
            body = {"model": self.model, "prompt": "x", "stream": stream}
            try:
                answer = await client.post(f"{self.url}/v1/completions", json=body)
                problem = _problem(answer, self.model, stream)
            except httpx.HTTPError as error:
                self.failures.append(repr(error))
                continue
            if problem:
                self.failures.append(problem)
                continue
            by = answer.headers["x-manta-served-by"]
            self.served_by[by] += 1
            self.pids[by] = int(answer.headers["x-pid"])


def _problem(answer: httpx.Response, model: str, stream: bool) -> str:
    """What is wrong with an answer; empty if nothing."""
    if answer.status_code != 200:
        return f"{answer.status_code} {answer.text}"
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    if stream and (len(lines) != 6 or lines.pop() != "[DONE]"):
        return f"not whole: {answer.text}"
    if any(json.loads(line)["model"] != model for line in lines):
        return f"another name: {answer.text}"
    return ""
