"""Requests sent on from one real server to another, and what clients see when that goes wrong."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from real_server import served, until
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from manta.serving.forwarding.forward import CutShort, Forwarder, NotForwarded, Sent, Why
from manta.serving.request.exchange import read_body


class Upstream:
    """Answers as its path says, and remembers who asked."""

    def __init__(self) -> None:
        self.num_running = 0
        self.clients: list[Any] = []
        self.go_on = asyncio.Event()
        routes = {
            "/echo": self.echo,
            "/words": self.words,
            "/slow": self.slow,
            "/cut": self.cut,
            "/cut-early": self.cut,
            "/down": lambda request: PlainTextResponse("nobody", 503, {"retry-after": "7"}),
            "/error": lambda request: JSONResponse({"error": {"message": "no"}}, 500),
            "/empty": lambda request: Response(status_code=204),
        }
        self.app = Starlette(
            routes=[
                Route(path, answer, methods=["GET", "POST"]) for path, answer in routes.items()
            ]
        )

    async def echo(self, request: Request) -> Response:
        self.clients.append(request.client)
        body = await request.body()
        seen = {
            "method": request.method,
            "query": request.url.query,
            "headers": dict(request.headers),
            "sha256": hashlib.sha256(body).hexdigest(),
        }
        hop = {"connection": "x-mine", "x-mine": "1", "x-yours": "2", "keep-alive": "9"}
        return JSONResponse(seen, 201, hop)

    async def words(self, request: Request) -> Response:
        return StreamingResponse(self.stream(), media_type="text/event-stream")

    async def stream(self) -> AsyncIterator[str]:
        self.num_running += 1
        try:
            yield "one "
            await self.go_on.wait()
            yield "two"
        finally:
            self.num_running -= 1

    async def slow(self, request: Request) -> Response:
        self.num_running += 1
        try:
            while not await request.is_disconnected():
                await asyncio.sleep(0.005)
            return PlainTextResponse("late")
        finally:
            self.num_running -= 1

    async def cut(self, request: Request) -> Response:
        async def broken() -> AsyncIterator[str]:
            if request.url.path == "/cut":
                yield "half of "
                await asyncio.sleep(0.05)
            raise ConnectionError("the engine is gone")

        return StreamingResponse(broken())


class Front:
    """Sends all that it is asked on to one address, and notes what came of it."""

    def __init__(self, base: str, **options: Any) -> None:
        self.base, self.options = base, options
        self.forwarder = Forwarder(connect_timeout_s=0.5)
        self.results: list[Sent | Exception] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = await read_body(receive, 2**30)
        url = self.base + scope["path"]
        try:
            sent = await self.forwarder.forward(url, scope, body, receive, send, **self.options)
        except NotForwarded as error:
            self.results.append(error)
            await PlainTextResponse("elsewhere", 503)(scope, receive, send)
        except CutShort as error:
            self.results.append(error)
            raise
        else:
            self.results.append(sent)


@asynccontextmanager
async def lab(
    base: str | None = None, **options: Any
) -> AsyncIterator[tuple[Upstream, Front, httpx.AsyncClient]]:
    upstream = Upstream()
    async with served(upstream.app) as url:
        front = Front(base or url, **options)
        async with served(front) as here, httpx.AsyncClient(base_url=here) as client:
            try:
                yield upstream, front, client
            finally:
                await front.forwarder.close()


def test_a_request_arrives_whole_and_its_answer_comes_back_without_headers_of_one_hop() -> None:
    async def run() -> None:
        async with lab(headers=[(b"Authorization", b"Bearer ours")]) as (_, front, client):
            body = b"x" * 3_000_000
            headers = {
                "authorization": "Bearer theirs",
                "connection": "x-hop, keep-alive",
                "x-hop": "1",
                "x-kept": "2",
                "te": "trailers",
            }
            answer = await client.post("/echo?a=b%20c", content=body, headers=headers)
            seen = answer.json()
            assert answer.status_code == 201
            assert (seen["method"], seen["query"]) == ("POST", "a=b%20c")
            assert seen["sha256"] == hashlib.sha256(body).hexdigest()
            assert seen["headers"]["authorization"] == "Bearer ours"
            assert seen["headers"]["x-kept"] == "2"
            assert seen["headers"]["content-length"] == str(len(body))
            assert seen["headers"]["host"] == front.base.removeprefix("http://")
            assert not {"x-hop", "te"} & seen["headers"].keys()
            assert answer.headers["x-yours"] == "2"
            assert "x-mine" not in answer.headers
            assert len(answer.headers.get_list("date")) == 1
            (sent,) = front.results
            assert isinstance(sent, Sent)
            assert (sent.status, sent.whole) == (201, True)

    asyncio.run(run())


def test_connections_are_kept_for_the_next_request() -> None:
    async def run() -> None:
        async with lab() as (upstream, _, client):
            for _ in range(3):
                assert (await client.get("/echo")).status_code == 201
            assert len(set(upstream.clients)) == 1

    asyncio.run(run())


@pytest.mark.parametrize(("num_answered", "status"), [(1, 200), (0, 503)])
def test_a_kept_connection_that_is_closed_under_a_request_costs_no_request(
    num_answered: int, status: int
) -> None:
    num_connections = 0

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_connections
        num_connections += 1
        for _ in range(num_answered):
            await reader.readuntil(b"hello")
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi")
        await reader.readuntil(b"hello")
        writer.close()

    async def run() -> None:
        server = await asyncio.start_server(connected, "127.0.0.1", 0)
        host, port = server.sockets[0].getsockname()
        async with lab(f"http://{host}:{port}") as (_, _, client):
            answers = [await client.post("/x", content=b"hello") for _ in range(3)]
        assert [answer.status_code for answer in answers] == [status] * 3
        assert num_connections == 3, "one that is new is not tried again"
        server.close()

    asyncio.run(run())


def test_parts_of_an_answer_come_as_they_are_made() -> None:
    async def run() -> None:
        async with lab() as (upstream, _, client), client.stream("POST", "/words") as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            parts = answer.aiter_text()
            assert await anext(parts) == "one "
            upstream.go_on.set()
            assert [part async for part in parts] == ["two"]

    asyncio.run(run())


@pytest.mark.parametrize("path", ["/words", "/slow"])
def test_a_client_that_goes_away_ends_the_request_upstream_at_once(path: str) -> None:
    async def run() -> None:
        async with lab() as (upstream, front, client):

            async def ask() -> None:
                async with client.stream("POST", path) as answer:
                    async for _ in answer.aiter_raw():
                        pass

            task = asyncio.create_task(ask())
            await until(lambda: upstream.num_running == 1)
            task.cancel()
            await until(lambda: upstream.num_running == 0, timeout_s=2)
            await until(lambda: bool(front.results))
            (sent,) = front.results
            assert isinstance(sent, Sent)
            assert not sent.whole

    asyncio.run(run())


def test_what_does_not_answer_can_be_tried_elsewhere() -> None:
    async def run() -> None:
        async with lab(first_byte_timeout_s=0.2) as (upstream, front, client):
            for path in ("/down", "/slow", "/cut-early"):
                assert (await client.get(path)).text == "elsewhere"
            front.base = "http://127.0.0.1:1"
            assert (await client.get("/echo")).text == "elsewhere"
            errors = [error for error in front.results if isinstance(error, NotForwarded)]
            assert [error.why for error in errors] == [
                Why.STATUS,
                Why.SILENT,
                Why.BROKEN,
                Why.UNREACHABLE,
            ]
            head = errors[0].head
            assert head is not None
            assert (head.status, head.get(b"retry-after")) == (503, b"7")
            await until(lambda: upstream.num_running == 0, timeout_s=2)

    asyncio.run(run())


def test_an_answer_without_a_body_and_an_error_of_the_application_pass() -> None:
    async def run() -> None:
        async with lab() as (_, _, client):
            assert (await client.get("/empty")).status_code == 204
            answer = await client.get("/error")
            assert (answer.status_code, answer.json()) == (500, {"error": {"message": "no"}})
            unknown = await client.get("/nowhere")  # plain text: nobody has that route
            assert unknown.text == "elsewhere"

    asyncio.run(run())


def test_an_answer_that_breaks_off_does_not_look_whole_to_the_client() -> None:
    async def run() -> None:
        async with lab() as (_, front, client):
            with pytest.raises(httpx.RemoteProtocolError):
                await client.get("/cut")
            assert isinstance(front.results[0], CutShort)

    asyncio.run(run())
