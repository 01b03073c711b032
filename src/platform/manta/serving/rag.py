"""Answers from documents: embed the question, retrieve passages, let a language model write.

Three deployments, each scaled by itself: the embedder, the retriever with its index, and the
ingress, which hands the question and what was found to an OpenAI-compatible endpoint. That one's
answer comes back as it is, streamed or whole; the header `x-sources` names the passages.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle
from starlette.background import BackgroundTask

from manta import storage
from manta.errors import InputError
from manta.serving.access import owner
from manta.serving.embeddings import Embedder, Vectors
from manta.serving.openai_app import arguments, guarded, openai_api
from manta.serving.openai_errors import Refused, bad_request
from manta.spec.apps import Generator, RagArgs

SUFFIXES = (".md", ".txt")
_TEXTS_AT_ONCE = 64
_INSTRUCTION = "Answer from these passages. Say so if they do not hold the answer.\n\n"

api = openai_api("Answers from documents")


@dataclass(frozen=True, kw_only=True)
class Passage:
    """A part of a document."""

    source: str
    """File and number of the passage in it."""
    text: str


class Retriever:
    """Finds the passages that are closest to a question."""

    async def __init__(  # type: ignore[misc]  # Ray awaits it
        self, embedder: DeploymentHandle, folder: str, passage_chars: int
    ) -> None:
        self._embedder = embedder
        self._passages = read_passages(folder, passage_chars)
        self._vectors = await self._embed([passage.text for passage in self._passages])

    async def search(self, question: str, num: int) -> list[Passage]:
        """The closest passages, best first."""
        (vector,) = await self._embed([question])
        best = np.argsort(self._vectors @ vector)[::-1][:num]
        return [self._passages[i] for i in best]

    async def _embed(self, texts: list[str]) -> Vectors:
        parts = [
            await self._embedder.embed.remote(texts[i : i + _TEXTS_AT_ONCE])
            for i in range(0, len(texts), _TEXTS_AT_ONCE)
        ]
        return np.concatenate(parts)


class Rag:
    """The routes. Ray makes one object of it in each replica."""

    def __init__(self, retriever: DeploymentHandle, config: RagArgs) -> None:
        self._retriever = retriever
        self._config = config
        generator = config.generator
        self._client = httpx.AsyncClient(
            base_url=generator.url.rstrip("/") + "/",
            headers={"Authorization": f"Bearer {api_key(generator)}"},
            timeout=generator.timeout_s,
        )

    @api.get("/v1/models")
    async def models(self) -> dict[str, Any]:
        """The one that there is, whatever model writes its answers."""
        one = {"id": self._config.model_id, "object": "model", "created": 0, "owned_by": "manta"}
        return {"object": "list", "data": [one]}

    @api.post("/v1/chat/completions")
    async def chat(self, request: Request) -> Response:
        """As OpenAI has it; the last message of the user is the question."""
        body = await _json(request)
        messages = body.get("messages")
        question = _last_question(messages)
        found = await self._retriever.search.remote(question, self._config.num_passages)
        assert isinstance(messages, list)
        told = {"role": "system", "content": _INSTRUCTION + _joined(found)}
        return await self._ask("chat/completions", {**body, "messages": [told, *messages]}, found)

    @api.post("/v1/completions")
    async def complete(self, request: Request) -> Response:
        """As OpenAI has it, for one prompt; the passages stand before it."""
        body = await _json(request)
        prompt = body.get("prompt")
        if not isinstance(prompt, str) or not prompt:
            raise bad_request("`prompt` must be one text", "prompt")
        found = await self._retriever.search.remote(prompt, self._config.num_passages)
        whole = {**body, "prompt": f"{_joined(found)}\n\n{prompt}"}
        return await self._ask("completions", whole, found)

    async def _ask(self, route: str, body: dict[str, Any], found: list[Passage]) -> Response:
        if body.get("model") not in (None, self._config.model_id):
            raise bad_request(f"the model here is `{self._config.model_id}`", "model")
        asked = {**body, "model": self._config.generator.model}
        try:
            answer = await self._client.send(
                self._client.build_request("POST", route, json=asked), stream=True
            )
        except httpx.HTTPError as error:
            reason = f"the generator does not answer ({type(error).__name__})"
            raise Refused(502, "generator_down", reason, kind="server_error") from None
        if answer.status_code in (401, 403):  # ours is wrong, not the client's
            await answer.aclose()
            raise Refused(502, "generator_closed", "the generator refused", kind="server_error")
        return StreamingResponse(
            answer.aiter_raw(),
            status_code=answer.status_code,
            media_type=answer.headers.get("content-type", "application/json"),
            headers={"x-sources": json.dumps([passage.source for passage in found])},
            background=BackgroundTask(answer.aclose),
        )


async def _json(request: Request) -> dict[str, Any]:
    try:
        body = json.loads(await request.body())
    except ValueError:
        raise bad_request("the body is not valid JSON", code="invalid_json") from None
    if not isinstance(body, dict):
        raise bad_request("the body is not a JSON object", code="invalid_json")
    return body


def _last_question(messages: Any) -> str:
    """Text of the user's last message. Raises Refused if there is none."""
    for message in reversed(messages if isinstance(messages, list) else []):
        if isinstance(message, dict) and message.get("role") == "user":
            content = message.get("content")
            parts = content if isinstance(content, list) else [{"text": content}]
            texts = [part.get("text") for part in parts if isinstance(part, dict)]
            question = "\n".join(text for text in texts if isinstance(text, str))
            if question.strip():
                return question
    raise bad_request("`messages` holds no text of the user", "messages")


def _joined(passages: list[Passage]) -> str:
    return "\n\n".join(f"[{passage.source}]\n{passage.text}" for passage in passages)


def read_passages(folder: str, passage_chars: int) -> list[Passage]:
    """All passages of the documents in a folder, a URL for fsspec.

    Raises:
        InputError: the folder cannot be read or holds no documents.
    """
    files = [url for url in storage.glob(folder) if url.endswith(SUFFIXES)]
    if not files:
        fix = "put the documents there, or set `documents`"
        raise InputError(f"{folder}: no {' or '.join(SUFFIXES)} files", fix)
    passages = []
    for url in files:
        name = url.removeprefix(f"{folder.rstrip('/')}/")
        text = storage.read_bytes(url).decode("utf-8", errors="replace")
        for number, part in enumerate(_cut(text, passage_chars), start=1):
            passages.append(Passage(source=f"{name}#{number}", text=part))
    return passages


def _cut(text: str, passage_chars: int) -> Iterator[str]:
    """Paragraphs, small ones joined and large ones cut."""
    held = ""
    for paragraph in re.split(r"\n\s*\n", text):
        joined = f"{held}\n\n{paragraph.strip()}".strip()
        if held and len(joined) > passage_chars:
            yield held
            joined = paragraph.strip()
        while len(joined) > passage_chars:
            yield joined[:passage_chars]
            joined = joined[passage_chars:]
        held = joined
    if held:
        yield held


def api_key(generator: Generator) -> str:
    """The key for the generator; `none` where nothing gives one, for an open endpoint.

    Raises InputError if the file that is named cannot be read.
    """
    if generator.api_key_file:
        return owner.read_secret(Path(generator.api_key_file).expanduser())
    if given := os.environ.get("OPENAI_API_KEY"):
        return given
    beside = owner.key_file()
    return owner.read_secret(beside) if beside else "none"


def build_app(args: dict[str, Any]) -> Application:
    """The application of `serve_apps/rag.yaml`. Raises InputError for wrong arguments."""
    config = arguments(RagArgs, args, "serve_apps/rag.yaml")
    address = "://" in config.documents or config.documents.startswith(("/", "~"))
    folder = config.documents if address else storage.join(storage.root(), config.documents)
    embedder = serve.deployment(Embedder, max_ongoing_requests=256).bind(config.embedder)
    retriever = serve.deployment(Retriever, max_ongoing_requests=256).bind(
        embedder, folder, config.passage_chars
    )
    ingress = serve.deployment(guarded(api, config.guard)(Rag), max_ongoing_requests=256)
    return ingress.bind(retriever, config)
