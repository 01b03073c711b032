"""The guard around an application: what it refuses, what it lets through, what it counts."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Mount, Route

from manta.serving.access import key_store, keys, usage
from manta.serving.access.keys import Role
from manta.serving.access.limits import Counter
from manta.serving.guard.guard import Guard
from manta.serving.guard.ingress import guarded_class
from manta.serving.guard.limiter import LocalLimiter
from manta.serving.telemetry import vitals
from manta.spec.guard import GuardConfig, Limits

CHAT = "/v1/chat/completions"


class Engine:
    """An application with the routes of an OpenAI server, which remembers what it was asked."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.num_running = self.most_running = 0
        self.hold = asyncio.Event()
        self.hold.set()
        routes = [
            Route("/v1/models", lambda request: JSONResponse({"data": []})),
            Route("/v1/completions", self.answer, methods=["POST"]),
            Route(CHAT, self.answer, methods=["POST"]),
            Route("/new/route", lambda request: JSONResponse({}), methods=["GET", "POST", "PUT"]),
            Route("/metrics", lambda request: JSONResponse({})),
        ]
        as_ray_does = [Middleware(BaseHTTPMiddleware, dispatch=pass_on)]
        self.app = Starlette(
            routes=[*routes, Mount("/llm", routes=routes)], middleware=as_ray_does
        )

    async def answer(self, request: Request) -> Any:
        body = await request.json()
        self.seen.append(body)
        self.headers.append(dict(request.headers))
        if body.get("stream"):
            return StreamingResponse(self.stream(body), media_type="text/event-stream")
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        try:
            await self.hold.wait()
        finally:
            self.num_running -= 1
        text = 'a trap: "usage": {"completion_tokens": 9}'
        return JSONResponse({"choices": [{"text": text}], "usage": USAGE, "logprobs": None})

    async def stream(self, body: dict[str, Any]) -> AsyncIterator[str]:
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        try:
            for word in ("one", "two", "three"):
                yield event({"choices": [{"text": word}], "usage": None})
                await self.hold.wait()
            if (body.get("stream_options") or {}).get("include_usage"):
                yield event({"choices": [], "usage": USAGE})
            yield "data: [DONE]\n\n"
        finally:
            self.num_running -= 1


async def pass_on(request: Request, call_next: Any) -> Any:
    return await call_next(request)


USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}


def event(value: object) -> str:
    return f"data: {json.dumps(value)}\n\n"


class Lab:
    """An engine behind one or more guards that share a store and a counter."""

    def __init__(self, root: Path, num_replicas: int = 1, **config: Any) -> None:
        self.root, self.engine, self.counter = str(root), Engine(), Counter()
        self.guards = [
            Guard(
                self.engine.app,
                GuardConfig(**config),
                key_store.KeyTable(self.root),
                LocalLimiter(f"replica-{number}", self.counter),
                usage.Ledger(self.root, {}),
                vitals.VitalsWriter(self.root, f"replica-{number}"),
            )
            for number in range(num_replicas)
        ]

    def key(self, **changes: Any) -> str:
        key, secret = keys.make(name="a", owner="me", now=time.time(), **changes)
        key_store.save(self.root, key)
        return secret

    def client(self, secret: str | None = None, replica: int = 0) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            transport=httpx.ASGITransport(self.guards[replica]),
            base_url="http://here",
            headers={"Authorization": f"Bearer {secret}"} if secret else {},
        )

    def used(self) -> list[tuple[int, int, int]]:
        rows = usage.read(self.root, usage.month_of(time.time()))
        return [(row.num_requests, row.prompt_tokens, row.completion_tokens) for row in rows]


@asynccontextmanager
async def lab(root: Path, num_replicas: int = 1, **config: Any) -> AsyncIterator[Lab]:
    made = Lab(root, num_replicas, **config)
    try:
        yield made
    finally:
        for guard in made.guards:
            await guard.stop()


def ask(**changes: Any) -> dict[str, Any]:
    return {"model": "m", "prompt": "hello", "max_tokens": 5, **changes}


def test_every_route_of_the_application_is_closed_without_a_key(tmp_path: Path) -> None:
    async def check() -> None:
        async with lab(tmp_path) as here:
            routes = [r for r in here.engine.app.routes if isinstance(r, Route)]
            assert len(routes) == 5
            for route in routes:
                for method in route.methods or ():
                    answer = await here.client().request(method, route.path)
                    assert answer.status_code == 401, route.path
                    if method != "HEAD":
                        assert answer.json()["error"]["code"] == "invalid_api_key"
            assert (await here.client().get("/no/such/route")).status_code == 401
            assert (await here.client().options("/v1/completions")).status_code == 401
            assert here.engine.seen == []

    asyncio.run(check())


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer ", "Basic abc", "Bearer manta_x", "manta", "Bearer \xff"]
)
def test_what_is_not_a_known_key_opens_nothing(tmp_path: Path, header: str) -> None:
    async def check() -> None:
        async with lab(tmp_path) as here:
            here.key()
            headers = {"Authorization": header.encode("latin-1")}
            answer = await here.client().post("/v1/completions", json=ask(), headers=headers)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"

    asyncio.run(check())


def test_a_route_that_is_new_is_for_administrators_only(tmp_path: Path) -> None:
    async def check() -> None:
        async with lab(tmp_path) as here:
            user, admin = here.key(), here.key(role=Role.ADMIN)
            assert (await here.client(user).post("/new/route")).status_code == 403
            assert (await here.client(admin).post("/new/route")).status_code == 200
            assert (await here.client(user).get("/v1/models")).status_code == 200

    asyncio.run(check())


def test_a_key_for_some_models_is_refused_for_others_and_for_none(tmp_path: Path) -> None:
    async def check() -> None:
        async with lab(tmp_path) as here:
            client = here.client(here.key(models=("m*",)))
            assert (await client.post(CHAT, json=ask(model="m:lora"))).status_code == 200
            for wrong, status in ((ask(model="other"), 403), ({"prompt": "x"}, 400)):
                answer = await client.post(CHAT, json=wrong)
                assert answer.status_code == status
                assert answer.json()["error"]["param"] == "model"
            assert (await client.get("/v1/models/other")).status_code == 403
            assert len(here.engine.seen) == 1

    asyncio.run(check())


def test_a_revoked_key_is_refused_within_two_seconds_on_every_replica(tmp_path: Path) -> None:
    async def check() -> None:
        async with lab(tmp_path, num_replicas=3) as here:
            secret = here.key()
            clients = [here.client(secret, replica) for replica in range(3)]
            for client in clients:
                assert (await client.get("/v1/models")).status_code == 200
            key_store.revoke(here.root, secret.split("_")[1], 0, "me")
            deadline = time.monotonic() + 2
            for client in clients:
                while (await client.get("/v1/models")).status_code != 401:
                    assert time.monotonic() < deadline
                    await asyncio.sleep(0.05)

    asyncio.run(check())


def test_a_key_made_later_opens_without_a_restart(tmp_path: Path) -> None:
    async def check() -> None:
        async with lab(tmp_path) as here:
            assert (await here.client().get("/v1/models")).status_code == 401
            client, deadline = here.client(here.key()), time.monotonic() + 2
            while (await client.get("/v1/models")).status_code != 200:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.05)

    asyncio.run(check())


def test_a_guard_that_never_read_its_keys_lets_nobody_in(tmp_path: Path) -> None:
    async def check() -> None:
        async with lab(tmp_path) as here:
            secret = here.key()
            here.guards[0]._table.root = "nosuchstore://bucket"
            answer = await here.client(secret).get("/v1/models")
            assert answer.status_code == 503

    asyncio.run(check())


def test_the_application_never_sees_the_key(tmp_path: Path) -> None:
    async def check() -> None:
        async with lab(tmp_path) as here:
            secret = here.key()
            await here.client(secret).post("/v1/completions", json=ask())
            assert secret not in json.dumps(here.engine.headers)
            assert "authorization" not in here.engine.headers[0]

    asyncio.run(check())


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"{", 400, "not valid JSON"),
        (b"[]", 400, "not a JSON object"),
        (b"[" * 100_000, 400, "not valid JSON"),
        (json.dumps(ask(prompt="x" * 2000)).encode(), 413, "may have 1000 bytes"),
        (json.dumps(ask(prompt="x" * 200)).encode(), 400, "at most 100"),
        (json.dumps(ask(prompt=["x"] * 5)).encode(), 400, "5 inputs; at most 4"),
        (json.dumps(ask(n=5)).encode(), 400, "`n` is 5; at most 4"),
        (json.dumps(ask(n="many")).encode(), 400, "whole number"),
        (json.dumps(ask(max_tokens=-1)).encode(), 400, "whole number"),
        (json.dumps(ask(model=["m"])).encode(), 400, "not a string"),
    ],
)
def test_what_is_too_large_or_malformed_is_refused_in_openais_words(
    tmp_path: Path, body: bytes, status: int, words: str
) -> None:
    async def check() -> None:
        bounds = {"max_prompt_chars": 100, "max_prompts": 4, "max_choices": 4}
        room = 200_000 if len(body) > 10_000 else 1000
        async with lab(tmp_path, max_body_bytes=room, **bounds) as here:
            answer = await here.client(here.key()).post("/v1/completions", content=body)
            assert answer.status_code == status
            assert words in answer.json()["error"]["message"]
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
            assert here.engine.seen == []

    asyncio.run(check())


def test_a_body_without_a_length_is_cut_at_the_bound(tmp_path: Path) -> None:
    async def endless() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b"x" * 1000

    async def check() -> None:
        async with lab(tmp_path, max_body_bytes=5000) as here:
            answer = await here.client(here.key()).post("/v1/completions", content=endless())
            assert answer.status_code == 413

    asyncio.run(check())


def test_use_is_what_the_engine_counted_and_survives_a_restart(tmp_path: Path) -> None:
    async def check() -> None:
        for _ in range(2):  # the second is the replica after a restart
            async with lab(tmp_path) as here:
                client = here.client((tmp_path / "secret").read_text())
                await client.post("/v1/completions", json=ask())
                await client.post("/v1/completions", json=ask(stream=True))

    (tmp_path / "secret").write_text(Lab(tmp_path).key())
    asyncio.run(check())
    assert Lab(tmp_path).used() == [(4, 28, 12)]


def test_a_stream_tells_its_use_only_to_a_client_that_asked(tmp_path: Path) -> None:
    async def check() -> None:
        async with lab(tmp_path) as here:
            client = here.client(here.key())
            plain = await client.post("/v1/completions", json=ask(stream=True))
            assert '"total_tokens"' not in plain.text
            assert plain.text.count("data: ") == 4
            assert plain.text.endswith("data: [DONE]\n\n")
            options = {"include_usage": True}
            told = await client.post(
                "/v1/completions", json=ask(stream=True, stream_options=options)
            )
            assert '"total_tokens"' in told.text

    asyncio.run(check())


def test_three_replicas_together_hold_the_limit_of_one(tmp_path: Path) -> None:
    async def check() -> None:
        async with lab(tmp_path, num_replicas=3) as here:
            secret = here.key(limits=Limits(requests_per_min=40))
            clients = [here.client(secret, replica) for replica in range(3)]
            answers = await asyncio.gather(
                *(client.post(CHAT, json=ask()) for client in clients for _ in range(40))
            )
            good = [a for a in answers if a.status_code == 200]
            late = [a for a in answers if a.status_code == 429]
            assert (len(good), len(late)) == (40, 80)
            assert 55 <= int(late[0].headers["retry-after"]) <= 61
            assert late[0].json()["error"]["code"] == "rate_limit_exceeded"

    asyncio.run(check())


def test_tokens_per_minute_are_those_the_engine_counted(tmp_path: Path) -> None:
    async def check() -> None:
        async with lab(tmp_path) as here:
            client = here.client(here.key(limits=Limits(tokens_per_min=100)))
            codes = [
                (await client.post("/v1/completions", json=ask())).status_code for _ in range(20)
            ]
            assert codes.count(200) == 10  # of 10 tokens each, whatever was reserved

    asyncio.run(check())


def test_a_stream_holds_its_slot_until_its_end_and_a_client_that_goes_away_frees_it(
    tmp_path: Path,
) -> None:
    async def check() -> None:
        async with lab(tmp_path) as here:
            client = here.client(here.key(limits=Limits(concurrent_requests=1)))
            here.engine.hold.clear()
            stream = asyncio.create_task(client.post("/v1/completions", json=ask(stream=True)))
            while not here.engine.num_running:
                await asyncio.sleep(0.01)
            assert (await client.post("/v1/completions", json=ask())).status_code == 429
            stream.cancel()  # as Serve does when the connection breaks
            await asyncio.gather(stream, return_exceptions=True)
            here.engine.hold.set()
            assert (await client.post("/v1/completions", json=ask())).status_code == 200
            await here.guards[0].stop()
            (used,) = here.used()
            assert used[0] == 2
            assert used[2] >= 3 + 1  # what had been streamed counts too

    asyncio.run(check())


@pytest.mark.parametrize("stream", [False, True])
def test_leaving_before_the_end_is_not_free(tmp_path: Path, stream: bool) -> None:
    async def check() -> None:
        async with lab(tmp_path) as here:
            client = here.client(here.key(limits=Limits(tokens_per_min=1000)))
            here.engine.hold.clear()
            body = ask(prompt="x" * 2700, stream=stream)  # about 900 tokens
            one = asyncio.create_task(client.post("/v1/completions", json=body))
            while not here.engine.num_running:
                await asyncio.sleep(0.01)
            one.cancel()
            await asyncio.gather(one, return_exceptions=True)
            here.engine.hold.set()
            assert (await client.post("/v1/completions", json=body)).status_code == 429
            await here.guards[0].stop()
            (used,) = here.used()
            assert used[1] > 900

    asyncio.run(check())


def test_more_than_there_is_room_for_is_refused_at_once(tmp_path: Path) -> None:
    async def check() -> None:
        async with lab(tmp_path, max_requests_in_flight=4) as here:
            client = here.client(here.key())
            here.engine.hold.clear()
            held = [asyncio.create_task(client.post(CHAT, json=ask())) for _ in range(4)]
            while here.engine.num_running < 4:
                await asyncio.sleep(0.01)
            began = time.perf_counter()
            answers = await asyncio.gather(*(client.post(CHAT, json=ask()) for _ in range(20)))
            assert time.perf_counter() - began < 20 * 0.05
            assert {a.status_code for a in answers} == {503}
            assert answers[0].headers["retry-after"] == "1"
            here.engine.hold.set()
            assert {(await one).status_code for one in held} == {200}

    asyncio.run(check())


@pytest.mark.parametrize("stream", [False, True])
def test_of_ten_times_as_many_as_there_is_room_for_those_let_in_are_whole_and_the_rest_are_told(
    tmp_path: Path, stream: bool
) -> None:
    async def check() -> None:
        async with lab(tmp_path, max_requests_in_flight=4) as here:
            client = here.client(here.key())

            async def pulse() -> None:
                while True:
                    here.engine.hold.clear()
                    await asyncio.sleep(0.02)
                    here.engine.hold.set()
                    await asyncio.sleep(0.005)

            async def late(number: int) -> httpx.Response:
                await asyncio.sleep(0.01 * number)
                return await client.post(CHAT, json=ask(stream=stream))

            pulsing = asyncio.create_task(pulse())
            answers = await asyncio.gather(*(late(n % 10) for n in range(80)))
            pulsing.cancel()
            good = [a for a in answers if a.status_code == 200]
            assert len(good) >= 4
            assert all(a.text.endswith("[DONE]\n\n" if stream else "null}") for a in good)
            refused = [a for a in answers if a.status_code != 200]
            assert refused
            assert {(a.status_code, a.json()["error"]["code"]) for a in refused} == {
                (503, "overloaded")
            }
            assert {a.headers["retry-after"] for a in refused} == {"1"}
            assert here.engine.most_running == 4
            assert here.engine.num_running == 0

    asyncio.run(check())


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_takes_too_long_ends_with_an_error(tmp_path: Path, stream: bool) -> None:
    async def check() -> None:
        async with lab(tmp_path, request_timeout_s=0.2) as here:
            here.engine.hold.clear()
            answer = await here.client(here.key()).post(CHAT, json=ask(stream=stream))
            assert answer.status_code == (200 if stream else 504)
            assert '"code": "timeout"' in answer.text
            assert here.engine.num_running == 0

    asyncio.run(check())


def test_vitals_count_what_was_answered_and_what_failed_but_not_who_went_away(
    tmp_path: Path,
) -> None:
    async def check() -> None:
        async with lab(tmp_path, request_timeout_s=0.3) as here:
            client = here.client(here.key())
            for _ in range(3):
                assert (await client.post(CHAT, json=ask())).status_code == 200
            assert (await client.post("/none", json=ask())).status_code == 403
            here.engine.hold.clear()
            await client.post(CHAT, json=ask())  # 504
            await client.post(CHAT, json=ask(stream=True))  # cut
            gone = asyncio.create_task(client.post(CHAT, json=ask()))
            while not here.engine.num_running:
                await asyncio.sleep(0.01)
            gone.cancel()
            await asyncio.gather(gone, return_exceptions=True)
            await here.guards[0].stop()
            found = vitals.read(str(tmp_path), ["replica-0"])
            assert (found.num_requests, found.num_errors) == (5, 2)
            assert found.num_latencies == 3

    asyncio.run(check())


def test_behind_a_route_prefix_the_same_rules_hold(tmp_path: Path) -> None:
    async def check() -> None:
        async with lab(tmp_path) as here:
            transport = httpx.ASGITransport(here.guards[0], root_path="/llm")
            headers = {"Authorization": f"Bearer {here.key()}"}
            async with httpx.AsyncClient(
                transport=transport, base_url="http://here", headers=headers
            ) as client:
                assert (await client.post("/llm/v1/completions", json=ask())).status_code == 200
                assert (await client.get("/llm/metrics")).status_code == 403

    asyncio.run(check())


def test_an_open_application_still_has_its_bounds(tmp_path: Path) -> None:
    async def check() -> None:
        async with lab(tmp_path, keys="none", max_body_bytes=50) as here:
            assert (await here.client().get("/new/route")).status_code == 200
            answer = await here.client().post(CHAT, json=ask(prompt="x" * 100))
            assert answer.status_code == 413

    asyncio.run(check())


def test_a_websocket_is_refused(tmp_path: Path) -> None:
    async def check() -> None:
        async with lab(tmp_path) as here:
            sent: list[Any] = []

            async def send(message: Any) -> None:
                sent.append(message)

            async def receive() -> Any:
                return {"type": "websocket.connect"}

            await here.guards[0]({"type": "websocket", "headers": []}, receive, send)
            assert [m["type"] for m in sent] == ["websocket.close"]

    asyncio.run(check())


class Served:
    """A class that answers HTTP, as Ray makes it."""

    def _set_asgi_app(self, app: Any) -> None:
        self.app = app

    async def check_health(self) -> None:
        pass


def test_a_class_gets_its_guard_when_ray_gives_it_its_application(tmp_path: Path) -> None:
    made = guarded_class(Served, GuardConfig(max_body_bytes=9), str(tmp_path))
    assert made.__name__ == "Served"
    served = made()
    served._set_asgi_app(Engine().app)
    assert isinstance(served.app, Guard)
    asyncio.run(served.check_health())


def test_a_class_whose_application_came_another_way_is_never_healthy(tmp_path: Path) -> None:
    served = guarded_class(Served, GuardConfig(), str(tmp_path))()
    served.app = Engine().app
    with pytest.raises(RuntimeError, match="guard is not in front"):
        asyncio.run(served.check_health())
