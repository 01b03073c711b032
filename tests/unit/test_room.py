"""Who finds no room is refused by the real HAProxy, at the bound of the real guard behind it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from proxies import end_all
from real_server import served, until
from watched_guard import Numbers

from manta.cluster import haproxy
from manta.cluster.ports import free
from manta.serving.access import usage
from manta.serving.access.key_store import KeyTable
from manta.serving.guard import room
from manta.serving.guard.guard import Guard
from manta.serving.guard.limiter import LocalLimiter
from manta.serving.telemetry.observer import Observer
from manta.spec.guard import GuardConfig

ROOM = 3
CHAT = "/v1/chat/completions"


@dataclass
class Engine:
    """Answers when it is let go; notes what it is asked."""

    go: asyncio.Event = field(default_factory=asyncio.Event)
    num_running: int = 0
    seen: list[dict[bytes, bytes]] = field(default_factory=list)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.seen.append(dict(scope["headers"]))
        self.num_running += 1
        try:
            if scope["method"] == "POST":
                await receive()
                await self.go.wait()
            headers = [(b"content-length", b"2")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": b"{}"})
        finally:
            self.num_running -= 1


@dataclass
class Place:
    """HAProxy with two backends: one guarded application, one that knows no guard."""

    client: httpx.AsyncClient
    engine: Engine
    guard: Guard
    other: Engine
    heard: Numbers
    guard_url: str

    @property
    def num_overload(self) -> float:
        """Requests that the guard has told of as refused for want of room."""
        return self.heard.get("ray_manta_requests_total", status="503", outcome="overload")

    async def fill(self) -> list[asyncio.Task[httpx.Response]]:
        """As many requests as there is room for; HAProxy has seen an answer before."""
        self.engine.go.set()
        assert (await self.ask()).status_code == 200
        self.engine.go.clear()
        held = [asyncio.create_task(self.ask()) for _ in range(ROOM)]
        await until(lambda: self.engine.num_running == ROOM)
        return held

    async def ask(self, path: str = CHAT, **options: Any) -> httpx.Response:
        return await self.client.post(path, **({"json": {"model": "m"}} | options))


@asynccontextmanager
async def place(folder: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Place]:
    program = haproxy.binary()
    if program is None:
        pytest.skip("no HAProxy on this platform")
    for name in (haproxy.ROOM_VARIABLE, "RAY_SERVE_ENABLE_HA_PROXY"):
        monkeypatch.setenv(name, "1")
    engine, other, heard = Engine(), Engine(), Numbers()
    guard = Guard(
        engine,
        GuardConfig(keys="none", max_requests_in_flight=ROOM),
        KeyTable(str(folder)),
        LocalLimiter("replica"),
        usage.Ledger(str(folder), {}),
        observer=Observer(heard),
    )
    other.go.set()
    (port,) = free(1, ())
    haproxy.write_script(folder / "h", program)
    config = folder / "haproxy.cfg"
    async with served(guard) as guard_url, served(other) as other_url:
        config.write_text(
            "global\n    nbthread 1\ndefaults\n    mode http\n    timeout client 9s\n"
            f"    timeout server 9s\n    timeout connect 9s\nfrontend http_frontend\n"
            f"    bind 127.0.0.1:{port}\n    use_backend http-other if {{ path_beg /other/ }}\n"
            f"    default_backend http-llm\n"
            f"backend http-llm\n    log global\n    server one {guard_url[7:]} check\n"
            f"backend http-other\n    log global\n    server one {other_url[7:]} check\n"
        )
        script = folder / "h" / haproxy.SCRIPT
        for _ in range(2):  # as when it is started anew with the same file
            subprocess.run([script, "-c", "-f", config], check=True, capture_output=True)
        process = subprocess.Popen([script, "-db", "-f", config], stderr=subprocess.DEVNULL)
        limits = httpx.Limits(max_connections=100)
        url = f"http://127.0.0.1:{port}"
        client = httpx.AsyncClient(base_url=url, limits=limits, timeout=20, trust_env=False)
        try:
            await until(lambda: listens(port))
            yield Place(client, engine, guard, other, heard, guard_url)
        finally:
            engine.go.set()
            await client.aclose()
            end_all(config)
            process.wait(10)
            await guard.stop()


def listens(port: int) -> bool:
    with socket.socket() as tried, contextlib.suppress(ConnectionError):
        tried.connect(("127.0.0.1", port))
        return True
    return False


def test_who_finds_no_room_never_reaches_the_replica_and_is_told_and_counted_as_by_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check() -> None:
        async with place(tmp_path, monkeypatch) as here:
            held = await here.fill()
            num_seen = len(here.engine.seen)
            refused = await asyncio.gather(*(here.ask() for _ in range(20)))
            assert {one.status_code for one in refused} == {503}
            assert not here.num_overload
            async with httpx.AsyncClient(base_url=here.guard_url, trust_env=False) as direct:
                by_guard = await direct.post(CHAT, json={"model": "m"})
            assert by_guard.status_code == 503
            assert {one.text for one in refused} == {by_guard.text}
            for name in ("content-type", "retry-after"):
                assert {one.headers[name] for one in refused} == {by_guard.headers[name]}
            assert len(here.engine.seen) == num_seen
            here.engine.go.set()
            assert {(await one).status_code for one in held} == {200}
            assert (await here.ask()).status_code == 200
            await here.guard.stop()
            assert here.num_overload == 20 + 1
            assert here.heard.get("ray_manta_requests_in_flight_max") == ROOM

    asyncio.run(check())


def test_what_asks_no_model_is_answered_when_there_is_no_room_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check() -> None:
        async with place(tmp_path, monkeypatch) as here:
            held = await here.fill()
            for path in ("/v1/models", "/metrics", "/health"):
                assert (await here.client.get(path)).status_code == 200
            here.engine.go.set()
            await asyncio.gather(*held)

    asyncio.run(check())


def test_a_prompt_of_any_length_gets_its_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check() -> None:
        async with place(tmp_path, monkeypatch) as here:
            held = await here.fill()
            for num_bytes in (10, 1_000, 11_990, 12_001, 100_000, 1_000_000, 4_000_000):
                asked = [here.ask(content=b"x" * num_bytes) for _ in range(8)]
                answers = await asyncio.gather(*asked)
                assert {(a.status_code, a.json()["error"]["code"]) for a in answers} == {
                    (503, "overloaded")
                }, num_bytes
            here.engine.go.set()
            await asyncio.gather(*held)

    asyncio.run(check())


def test_a_client_whose_body_comes_late_is_refused_at_once_and_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def late(here: Place) -> bytes:
        url = here.client.base_url
        reader, writer = await asyncio.open_connection(url.host, url.port)
        head = f"POST {CHAT} HTTP/1.1\r\nhost: here\r\ncontent-length: 9000\r\n\r\n"
        writer.write(head.encode())
        await asyncio.sleep(0.2)
        writer.write(b"x" * 9000)
        with contextlib.suppress(ConnectionError):
            await writer.drain()
        answer = await reader.readuntil(b"\r\n")
        writer.close()
        return answer

    async def check() -> None:
        async with place(tmp_path, monkeypatch) as here:
            held = await here.fill()
            answers = await asyncio.gather(*(late(here) for _ in range(20)))
            assert set(answers) == {b"HTTP/1.1 503 Service Unavailable\r\n"}
            here.engine.go.set()
            await asyncio.gather(*held)

    asyncio.run(check())


def test_another_application_on_the_port_has_no_bound_and_hears_of_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check() -> None:
        async with place(tmp_path, monkeypatch) as here:
            held = await here.fill()
            answers = await asyncio.gather(*(here.ask("/other/x") for _ in range(20)))
            assert {one.status_code for one in answers} == {200}
            assert not any(b"x-manta-refused" in headers for headers in here.other.seen)
            here.engine.go.set()
            await asyncio.gather(*held)

    asyncio.run(check())


def test_clients_neither_see_the_bound_nor_make_up_refusals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check() -> None:
        async with place(tmp_path, monkeypatch) as here:
            here.engine.go.set()
            for _ in range(2):
                answer = await here.ask(headers={"x-manta-refused": "1000"})
                assert answer.status_code == 200
                assert not [name for name in answer.headers if name.startswith("x-manta")]
            await here.guard.stop()
            assert not here.num_overload

    asyncio.run(check())


def test_where_no_such_haproxy_stands_in_front_nothing_is_told_or_believed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(haproxy.ROOM_VARIABLE, "1")
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "0")  # as one may ask of `manta up`
    made = room.Room(5)
    assert made.refused_before({"headers": [(room.REFUSED, b"7")]}) == 0

    async def send(message: Any) -> None:
        pass

    assert made.told(send) is send


@pytest.mark.parametrize(
    ("stated", "num_sequences", "most"), [(96, 128, 96), (None, 128, 256), (None, None, 512)]
)
def test_a_bound_that_is_not_stated_follows_from_what_the_engine_runs_at_once(
    stated: int | None, num_sequences: int | None, most: int
) -> None:
    assert room.Room(stated, num_sequences).most == most
