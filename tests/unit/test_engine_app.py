"""What stands right behind the guard: the list of models, and errors in OpenAI's words."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, HTTPException
from fastapi.responses import JSONResponse, StreamingResponse
from test_adapters import Shelf

from manta.serving.engine.adapters import Adapters
from manta.serving.engine.engine_app import EngineApp
from manta.serving.request.exchange import MODEL


def engine() -> FastAPI:
    """As vLLM and Ray put it together."""
    api = FastAPI()

    @api.get("/v1/models")
    async def models() -> dict[str, Any]:
        cards = [{"id": "base", "object": "model", "max_model_len": 9}, {"id": "base:a@1"}]
        return {"object": "list", "data": cards}

    @api.get("/v1/models/{model}")
    async def model(model: str) -> dict[str, Any]:
        if model != "base":
            raise HTTPException(404, f"Unknown model: {model}")
        return {"id": "base"}

    @api.post("/v1/completions")
    async def complete() -> StreamingResponse:
        return StreamingResponse(iter([b"data: 1\n\n", b"data: 2\n\n"]))

    @api.post("/v1/chat/completions")
    async def chat(count: int) -> None:
        raise AssertionError

    @api.post("/v1/chat/completions/derender")
    async def derender() -> JSONResponse:
        return JSONResponse({"error": {"message": "not yet", "code": 501}}, 501)

    return api


def ask(
    method: str,
    path: str,
    adapters: Adapters | None = None,
    model: str | None = None,
    prefix: str = "",
) -> httpx.Response:
    inside = EngineApp(engine(), adapters)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await inside({**scope, MODEL: model, "root_path": prefix}, receive, send)

    async def talk() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return await client.request(method, prefix + path)

    return asyncio.run(talk())


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("GET", "/v1/models/x", 404, "The model `x` does not exist."),
        ("GET", "/v1/nothing", 404, "Not Found"),
        ("GET", "/v1/completions", 405, "Method Not Allowed"),
        ("POST", "/v1/embeddings", 404, "the model that is served here cannot answer /v1/embed"),
        ("POST", "/v1/chat/completions", 422, "Field required"),
    ],
)
def test_errors_are_in_openais_words(method: str, path: str, status: int, message: str) -> None:
    answer = ask(method, path)
    assert answer.status_code == status
    assert message in answer.json()["error"]["message"]
    assert int(answer.headers["content-length"]) == len(answer.content)


def test_what_is_no_error_passes_as_it_comes() -> None:
    assert ask("POST", "/v1/completions").text == "data: 1\n\ndata: 2\n\n"


@pytest.mark.parametrize("prefix", ["", "/app"])
def test_adapters_are_listed_and_found_whether_loaded_or_not(tmp_path: Path, prefix: str) -> None:
    shelf = Shelf(tmp_path)
    for name in "ab":
        shelf.put(name)
    listed = ask("GET", "/v1/models", shelf.adapters, prefix=prefix).json()["data"]
    assert [card["id"] for card in listed] == ["base", "base:a", "base:b"]
    assert listed[1]["parent"] == "base"
    assert listed[1]["max_model_len"] == 9
    found = ask("GET", "/v1/models/base:b", shelf.adapters, prefix=prefix)
    assert found.json()["id"] == "base:b"
    assert ask("GET", "/v1/models/base", shelf.adapters, prefix=prefix).json() == {"id": "base"}
    missing = ask("GET", "/v1/models/base:c", shelf.adapters, prefix=prefix)
    assert missing.json()["error"]["code"] == "model_not_found"


def test_an_adapter_is_loaded_before_its_request_goes_on(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    shelf.put("a")
    assert ask("POST", "/v1/completions", shelf.adapters, "base:a").status_code == 200
    assert shelf.engine.num_loads == 1
    assert ask("POST", "/v1/completions", shelf.adapters, "base").status_code == 200
    assert ask("POST", "/v1/completions", shelf.adapters, "base:b").status_code == 404
    assert shelf.engine.num_loads == 1


def test_what_an_engine_does_not_support_yet_is_no_failure_of_the_server() -> None:
    answer = ask("POST", "/v1/chat/completions/derender")
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "not yet"
    assert answer.json()["error"]["code"] == "not_supported"
