"""The gateway before real servers: who is asked, what the client sees, what is counted."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import ValidationError
from real_server import served, until
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from manta.cluster import record
from manta.cluster.record import ClusterRecord
from manta.errors import InputError
from manta.serving.access import key_store, keys, usage
from manta.serving.access.limits import Counter as LimitCounter
from manta.serving.forwarding import targets
from manta.serving.forwarding.breaker import Breaker
from manta.serving.forwarding.targets import Applications, Upstream
from manta.serving.gateway import Gateway
from manta.serving.guard.guard import Guard
from manta.serving.guard.limiter import LocalLimiter
from manta.serving.telemetry.metrics import Metric
from manta.spec.gateway import BreakerConfig, GatewayArgs
from manta.spec.guard import GuardConfig

CHAT = "/v1/chat/completions"
NOBODY = "http://127.0.0.1:1/v1"


class Model:
    """A server with OpenAI's API that says who it is and what it was asked."""

    def __init__(self) -> None:
        self.mode = "ok"
        self.num_running = 0
        self.bodies: list[bytes] = []
        self.headers: list[dict[str, str]] = []
        self.queries: list[str] = []
        self.go_on = asyncio.Event()
        names = ("/v1/chat/completions", "/v1/embeddings", "/v1/audio/transcriptions", "/score")
        routes = [Route(path, self.answer, methods=["POST"]) for path in names]
        prefixed = [Route(f"/b{route.path}", self.answer, methods=["POST"]) for route in routes]
        here = Route("/-/routes", lambda _: JSONResponse({"/": "a", "/b": "llm-b"}))
        self.app = Starlette(routes=[here, *routes, *prefixed])

    @property
    def asked(self) -> list[dict[str, Any]]:
        return [json.loads(body) for body in self.bodies]

    async def answer(self, request: Request) -> Response:
        self.bodies.append(await request.body())
        self.headers.append(dict(request.headers))
        self.queries.append(request.url.query)
        if self.mode == "hang":
            await self._until_gone(request)
        if self.mode in REFUSALS:
            return REFUSALS[self.mode]
        if request.headers["content-type"].startswith("multipart"):
            return JSONResponse({"text": "heard"})
        asked = json.loads(self.bodies[-1])
        if asked.get("stream"):
            return StreamingResponse(self.stream(asked), media_type="text/event-stream")
        return JSONResponse(
            {"id": "1", "model": asked["model"], "choices": [{"text": QUOTE}], "usage": USAGE}
        )

    async def _until_gone(self, request: Request) -> None:
        self.num_running += 1
        while not await request.is_disconnected():
            await asyncio.sleep(0.005)
        self.num_running -= 1

    async def stream(self, asked: dict[str, Any]) -> AsyncIterator[bytes]:
        self.num_running += 1
        events = [{"model": asked["model"], "choices": [{"text": word}]} for word in ("a", QUOTE)]
        if (asked.get("stream_options") or {}).get("include_usage"):
            events.append({"model": asked["model"], "choices": [], "usage": USAGE})
        data = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events)
        try:
            for start in range(0, len(data), 7):  # as a network may cut it
                yield data[start : start + 7]
                await asyncio.sleep(0)
            if self.mode == "wait":
                await self.go_on.wait()
            if self.mode == "cut":
                yield b"data: {half an ev"
                await asyncio.sleep(0.05)
                raise ConnectionError("the engine is gone")
            yield b"data: [DONE]\n\n"
        finally:
            self.num_running -= 1


QUOTE = 'it says "model": "x"'
USAGE = {"prompt_tokens": 7, "completion_tokens": 2}
REFUSALS = {
    "500": PlainTextResponse("Internal Server Error", 500),
    "401": JSONResponse({"error": {"message": "who?"}}, 401),
    "404": JSONResponse({"detail": "Not Found"}, 404),
    "429": JSONResponse({"error": {"message": "slower"}}, 429, {"retry-after": "9"}),
    "400": JSONResponse({"error": {"message": "too long"}}, 400),
}


class Sink:
    """Metrics, in memory."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, ...]] = Counter()

    def add(self, metric: Metric, labels: Any, amount: float) -> None:
        self.counts[(metric.name, *labels.values())] += int(amount)

    def set(self, metric: Metric, labels: Any, value: float) -> None:
        self.counts[(metric.name, *labels.values())] = int(value)


class Lab:
    """A gateway before servers `one` and `two`, with a guard in front."""

    def __init__(self, root: Path, one: str, two: str, **args: Any) -> None:
        args = json.loads(json.dumps(args).replace("ONE", f"{one}/v1").replace("TWO", f"{two}/v1"))
        self.config = GatewayArgs.model_validate({"guard": {"keys": "none"}, **args})
        self.root, self.sink = str(root), Sink()
        applications = Applications(lambda: one)
        self.gateway = Gateway(self.config, applications, self.sink)
        self.guard = Guard(
            self.gateway,
            self.config.guard,
            key_store.KeyTable(self.root),
            LocalLimiter("replica", LimitCounter()),
            usage.Ledger(self.root, {}),
        )

    def key(self, **changes: Any) -> dict[str, str]:
        key, secret = keys.make(name="a", owner="me", now=time.time(), **changes)
        key_store.save(self.root, key)
        return {"authorization": f"Bearer {secret}"}

    def outcomes(self) -> list[tuple[str, str]]:
        self.gateway._news.tell(self.sink)
        found = [at for at in self.sink.counts if at[0] == "manta_gateway_requests"]
        return sorted((target, outcome) for _, _, target, outcome in found)


@asynccontextmanager
async def lab(
    root: Path, **args: Any
) -> AsyncIterator[tuple[Lab, httpx.AsyncClient, Model, Model]]:
    one, two = Model(), Model()
    async with AsyncExitStack() as stack:
        urls = [await stack.enter_async_context(served(model.app)) for model in (one, two)]
        made = Lab(root, *urls, **args)
        stack.push_async_callback(made.gateway.stop)
        stack.push_async_callback(made.guard.stop)
        here = await stack.enter_async_context(served(made.guard))
        client = await stack.enter_async_context(httpx.AsyncClient(base_url=here, timeout=10))
        yield made, client, one, two


def to(*urls: str, fallback: tuple[str, ...] = (), **more: Any) -> dict[str, Any]:
    model = {"to": [{"url": url, **more} for url in urls]}
    return {"m": {**model, "fallback": [{"url": url, **more} for url in fallback]}}


def ask(**changes: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": "hi"}], **changes}


# --- who is asked ----------------------------------------------------------------------------


def test_targets_share_requests_by_weight_and_fall_back_comes_last() -> None:
    shared = [{"app": "a", "weight": 9}, {"app": "b", "weight": 1}]
    model = {"to": shared, "fallback": [{"app": "c"}, {"app": "d"}]}
    config = GatewayArgs.model_validate({"models": {"m": model}})
    made = targets.served("m", config.models["m"], config.breaker)
    made = replace(made, draw=random.Random(1).random)
    orders = Counter("".join(one.label for one in made.in_order()) for _ in range(5000))
    assert orders.keys() == {"abcd", "bacd"}
    assert orders["abcd"] / 5000 == pytest.approx(0.9, abs=0.02)


def test_what_is_down_is_passed_over_and_the_answer_says_who_gave_it(tmp_path: Path) -> None:
    async def run() -> None:
        models = to(NOBODY, fallback=("ONE", "TWO"))
        async with lab(tmp_path, models=models) as (here, client, one, two):
            one.mode = "500"
            answer = await client.post(CHAT, json=ask())
            assert answer.status_code == 200
            assert answer.headers["x-manta-served-by"] == here.config.models["m"].fallback[1].label
            assert (len(one.bodies), len(two.bodies)) == (1, 1)
            assert sorted(outcome for _, outcome in here.outcomes()) == [
                "down",
                "ok",
                "unreachable",
            ]

    asyncio.run(run())


@pytest.mark.parametrize("stream", [True, False])
def test_a_target_that_says_nothing_in_time_is_given_up_and_its_request_ended(
    tmp_path: Path, stream: bool
) -> None:
    async def run() -> None:
        args = {"first_byte_timeout_s": 0.2, "answer_timeout_s": 0.2}
        async with lab(tmp_path, models=to("ONE", fallback=("TWO",)), **args) as (
            _,
            client,
            one,
            two,
        ):
            one.mode = "hang"
            assert (await client.post(CHAT, json=ask(stream=stream))).status_code == 200
            assert len(two.bodies) == 1
            await until(lambda: one.num_running == 0, timeout_s=2)

    asyncio.run(run())


@pytest.mark.parametrize("mode", ["401", "404", "429"])
def test_what_is_not_the_clients_fault_goes_to_the_next(tmp_path: Path, mode: str) -> None:
    async def run() -> None:
        async with lab(tmp_path, models=to("ONE", fallback=("TWO",))) as (_, client, one, two):
            one.mode = mode
            assert (await client.post(CHAT, json=ask())).status_code == 200
            assert len(two.bodies) == 1

    asyncio.run(run())


def test_what_is_the_clients_fault_does_not_and_overload_only_if_wanted(tmp_path: Path) -> None:
    async def run() -> None:
        args = {"models": to("ONE", fallback=("TWO",)), "fall_back_on_overload": False}
        async with lab(tmp_path, **args) as (_, client, one, two):
            for mode in ("400", "429"):
                one.mode = mode
                answer = await client.post(CHAT, json=ask())
                assert answer.status_code == int(mode)
            assert answer.headers["retry-after"] == "9"
            assert two.bodies == []

    asyncio.run(run())


def test_applications_of_the_cluster_are_found_by_name_and_get_routes_below_their_prefix(
    tmp_path: Path,
) -> None:
    async def run() -> None:
        models = {"m": {"to": [{"app": "llm-b"}]}, "n": {"to": [{"app": "gone"}]}}
        async with lab(tmp_path, models=models) as (_, client, one, _):
            answer = await client.post("/score", json={"model": "m", "text_1": "a"})
            assert answer.status_code == 200
            assert answer.headers["x-manta-served-by"] == "llm-b"
            assert len(one.bodies) == 1
            gone = await client.post(CHAT, json=ask(model="n"))
            assert gone.status_code == 503
            assert "gone unreachable" in gone.json()["error"]["message"]

    asyncio.run(run())


def test_an_application_of_another_cluster_is_asked_with_the_key_of_that_ones_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MANTA_HOME", str(tmp_path / "home"))

    async def run() -> None:
        async with (
            served(Model().app) as empty,
            lab(tmp_path, models=to("ONE")) as (
                here,
                client,
                one,
                _,
            ),
        ):
            url = here.config.models["m"].to[0].url
            assert url is not None
            names = ("gcs_address", "dashboard_url", "token_path", "temp_dir", "started_at")
            other = ClusterRecord(
                **dict.fromkeys((*names, "storage_url", "cluster_id"), ""),
                name="far",
                pid=0,
                serve_url=url.removesuffix("/v1"),
                attached=True,
            )
            record.save(other)
            record.path("far").with_name("api_key").write_text("far-owners")
            target = {"app": "llm-b", "cluster": "far"}
            config = {"guard": {"keys": "none"}, "models": {"m": {"to": [target]}}}
            gateway = Gateway(GatewayArgs.model_validate(config), Applications(lambda: empty))
            async with served(gateway) as second:
                answer = await client.post(f"{second}{CHAT}", json=ask())
            await gateway.stop()
            assert answer.headers["x-manta-served-by"] == "llm-b@far"
            assert one.headers[0]["authorization"] == "Bearer far-owners"

    asyncio.run(run())
    unknown = {"models": {"m": {"to": [{"app": "a", "cluster": "nowhere"}]}}}
    with pytest.raises(InputError, match="no cluster `nowhere`"):
        Gateway(GatewayArgs.model_validate(unknown))


# --- the breaker -----------------------------------------------------------------------------


def test_a_breaker_opens_after_failures_in_a_row_and_lets_one_request_try_after_its_pause() -> (
    None
):
    breaker = Breaker(BreakerConfig(failures=2, pause_s=10))
    for at in (0.0, 1.0):
        assert breaker.may_try(at)
        breaker.begin()
        breaker.answered()
        breaker.begin()
        breaker.failed(at)
    assert breaker.may_try(1.0), "never two in a row"
    breaker.failed(1.0)
    assert breaker.is_open()
    assert not breaker.may_try(10.9)
    assert breaker.pause_s(3.0) == pytest.approx(8.0)
    assert breaker.may_try(11.0)
    breaker.begin()
    assert not breaker.may_try(11.0), "one at a time"
    breaker.failed(11.5)
    assert not breaker.may_try(21.0)
    breaker.begin()
    breaker.undecided()  # its client went away
    assert breaker.may_try(21.5)
    breaker.begin()
    breaker.answered()
    assert not breaker.is_open()
    assert breaker.may_try(21.5)


def test_a_dead_target_is_asked_no_more_until_it_is_back(tmp_path: Path) -> None:
    async def run() -> None:
        args = {"models": to("ONE", fallback=("TWO",)), "breaker": {"failures": 2, "pause_s": 99}}
        async with lab(tmp_path, **args) as (here, client, one, two):
            breaker = here.gateway._models["m"].shared[0].breaker
            one.mode = "500"
            for _ in range(6):
                assert (await client.post(CHAT, json=ask())).status_code == 200
            assert (len(one.bodies), len(two.bodies)) == (2, 6)
            breaker._until = 0.0  # as if its pause were over
            many = [client.post(CHAT, json=ask()) for _ in range(8)]
            assert {answer.status_code for answer in await asyncio.gather(*many)} == {200}
            assert (len(one.bodies), len(two.bodies)) == (3, 14), "one of them tried it"
            one.mode = "ok"
            breaker._until = 0.0
            for _ in range(3):
                assert (await client.post(CHAT, json=ask())).status_code == 200
            assert (len(one.bodies), len(two.bodies)) == (6, 14)

    asyncio.run(run())


def test_when_nobody_answers_the_client_gets_one_error_that_says_when_to_try_again(
    tmp_path: Path,
) -> None:
    async def run() -> None:
        args = {"models": to("ONE", fallback=("TWO",)), "breaker": {"failures": 1, "pause_s": 5}}
        async with lab(tmp_path, **args) as (_, client, one, two):
            one.mode, two.mode = "500", "429"
            for _ in range(3):
                answer = await client.post(CHAT, json=ask())
                assert answer.status_code == 503
                error = answer.json()["error"]
                assert (error["type"], error["code"]) == ("server_error", "no_target")
                assert 1 <= int(answer.headers["retry-after"]) <= 9
            assert "left out" in error["message"]
            assert "overloaded" in error["message"]
            assert len(one.bodies) == 1

    asyncio.run(run())


def test_a_route_that_no_target_has_is_not_found_and_counts_against_none(tmp_path: Path) -> None:
    async def run() -> None:
        args = {"models": to("ONE"), "breaker": {"failures": 1, "pause_s": 60}}
        async with lab(tmp_path, **args) as (_, client, one, _):
            one.mode = "404"
            assert (await client.post(CHAT, json=ask())).status_code == 404
            one.mode = "ok"
            assert (await client.post(CHAT, json=ask())).status_code == 200

    asyncio.run(run())


def test_gateways_that_point_at_each_other_refuse_soon(tmp_path: Path) -> None:
    async def run() -> None:
        async with lab(tmp_path, models=to("ONE")) as (here, client, one, _):
            url = f"{str(client.base_url).rstrip('/')}/v1"
            config = GatewayArgs.model_validate({"models": to(url)})
            here.gateway._models["m"] = targets.served("m", config.models["m"], config.breaker)
            answer = await client.post(CHAT, json=ask())
            assert answer.status_code == 503
            assert one.bodies == []

    asyncio.run(run())


# --- what the client sees --------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_a_model_has_its_name_here_in_answers_whatever_it_is_called_there(
    tmp_path: Path, stream: bool
) -> None:
    async def run() -> None:
        async with lab(tmp_path, models=to("ONE", model="gpt-x")) as (_, client, one, _):
            answer = await client.post(CHAT, json=ask(stream=stream))
            assert one.asked[0]["model"] == "gpt-x"
            assert one.asked[0]["messages"] == ask()["messages"]
            if not stream:
                told = [answer.json()]
            else:
                lines = [line for line in answer.text.split("\n\n") if line]
                assert lines.pop() == "data: [DONE]"
                told = [json.loads(line.removeprefix("data: ")) for line in lines]
                assert len(told) == 2
            assert {one["model"] for one in told} == {"m"}
            assert told[-1]["choices"][0]["text"] == QUOTE

    asyncio.run(run())


def test_a_form_names_its_model_and_goes_on_with_the_targets_name(tmp_path: Path) -> None:
    async def run() -> None:
        async with lab(tmp_path, models=to("ONE", model="whisper-9")) as (_, client, one, _):
            sound = bytes(range(256)) * 10 + b'name="model"\r\n\r\nnot this'
            answer = await client.post(
                "/v1/audio/transcriptions",
                data={"language": "en", "model": "m"},
                files={"file": ("a.wav", sound)},
            )
            assert answer.json() == {"text": "heard"}
            assert b'name="model"\r\n\r\nwhisper-9\r\n' in one.bodies[0]
            assert sound in one.bodies[0]
            assert int(one.headers[0]["content-length"]) == len(one.bodies[0])

    asyncio.run(run())


@pytest.mark.parametrize(
    ("data", "status"),
    [({"language": "en"}, 400), ({"model": ["m", "m"]}, 400), ({"model": "other"}, 404)],
)
def test_a_form_names_one_model_that_there_is(
    tmp_path: Path, data: dict[str, Any], status: int
) -> None:
    async def run() -> None:
        async with lab(tmp_path, models=to("ONE")) as (_, client, _, _):
            route, files = "/v1/audio/transcriptions", {"file": ("a.wav", b"")}
            answer = await client.post(route, data=data, files=files)
            assert answer.status_code == status

    asyncio.run(run())


def test_an_answer_that_breaks_off_says_so_and_does_not_end_as_a_whole_one(tmp_path: Path) -> None:
    async def run() -> None:
        async with lab(tmp_path, models=to("ONE")) as (here, client, one, _):
            one.mode = "cut"
            parts: list[str] = []
            with pytest.raises(httpx.RemoteProtocolError):
                await read(client, parts)
            text = "".join(parts)
            last = text.rstrip().split("\n\n")[-1]
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == "cut_short"
            assert "half an ev" not in text
            assert [outcome for _, outcome in here.outcomes()] == ["cut"]

    asyncio.run(run())


async def read(client: httpx.AsyncClient, parts: list[str]) -> None:
    async with client.stream("POST", CHAT, json=ask(stream=True)) as answer:
        async for part in answer.aiter_text():
            parts.append(part)


def test_a_client_that_goes_away_ends_the_request_at_the_target(tmp_path: Path) -> None:
    async def run() -> None:
        async with lab(tmp_path, models=to("ONE")) as (here, client, one, _):
            one.mode = "wait"
            async with client.stream("POST", CHAT, json=ask(stream=True)) as answer:
                await anext(answer.aiter_raw())
                assert one.num_running == 1
            await until(lambda: one.num_running == 0, timeout_s=2)
            await until(lambda: bool(here.outcomes()))
            assert [outcome for _, outcome in here.outcomes()] == ["client_gone"]

    asyncio.run(run())


def test_a_name_that_stands_in_a_body_twice_reaches_an_address_once(tmp_path: Path) -> None:
    async def run() -> None:
        async with lab(tmp_path, models=to("ONE")) as (_, client, one, _):
            headers = {"content-type": "application/json"}
            twice = b'{"model": "theirs", "prompt": "x", "model": "m"}'
            answer = await client.post(CHAT + "?model=theirs", content=twice, headers=headers)
            assert answer.status_code == 200
            assert b"theirs" not in one.bodies[0]
            assert one.queries == [""]

    asyncio.run(run())


# --- keys and use ----------------------------------------------------------------------------


def test_targets_get_the_gateways_key_and_nothing_else_of_the_clients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets, "KEY_S", 0.0)
    file = tmp_path / "outside-key"
    file.write_text("first\n")

    async def run() -> None:
        models = to("ONE", api_key_file=str(file))
        async with lab(tmp_path, models=models) as (_, client, one, _):
            private = {"authorization": "Bearer mine", "cookie": "a=b", "x-forwarded-for": "me"}
            await client.post(CHAT, json=ask(), headers=private)
            file.write_text("second\n")
            await client.post(CHAT, json=ask(), headers=private)
            assert [seen["authorization"] for seen in one.headers] == [
                "Bearer first",
                "Bearer second",
            ]
            assert not {"cookie", "x-forwarded-for"} & one.headers[0].keys()

    asyncio.run(run())


def test_the_owners_key_goes_to_applications_of_the_cluster_and_never_outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "api_key").write_text("owners")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    model = {"to": [{"app": "a"}], "fallback": [{"url": "https://api.example.com/v1"}]}
    config = GatewayArgs.model_validate({"models": {"m": model}})
    made = targets.served("m", config.models["m"], config.breaker)
    assert [one.secret.value() for one in made.all] == ["owners", None]


@pytest.mark.parametrize("key", [{"api_key_file": "/no/such/file"}, {"api_key_env": "NO_SUCH"}])
def test_a_key_that_is_not_there_stops_the_gateway_from_starting(key: dict[str, str]) -> None:
    config = GatewayArgs.model_validate({"models": to(NOBODY, **key)})
    with pytest.raises(InputError, match=next(iter(key.values()))):
        Gateway(config)


def test_use_is_counted_at_the_gateway_whatever_way_a_stream_is_cut_up(tmp_path: Path) -> None:
    async def run() -> None:
        args = {"models": to("ONE"), "guard": {}}
        async with lab(tmp_path, **args) as (here, client, _, _):
            mine = here.key()
            assert (await client.post(CHAT, json=ask())).status_code == 401
            for stream in (True, False):
                answer = await client.post(CHAT, json=ask(stream=stream), headers=mine)
                assert answer.status_code == 200
                assert ("usage" in answer.text) is not stream, "a stream was not asked for it"
            await here.guard.stop()
            (row,) = usage.read(here.root, usage.month_of(time.time()))
            used = (row.model, row.num_requests, row.prompt_tokens, row.completion_tokens)
            assert used == ("m", 2, 14, 4)

    asyncio.run(run())


def test_a_key_sees_the_models_that_it_may_use_and_no_other_can_be_asked(tmp_path: Path) -> None:
    async def run() -> None:
        models = {name: to("ONE")["m"] for name in ("m", "m-large", "other")}
        async with lab(tmp_path, models=models, guard={}) as (here, client, one, _):
            scoped, admin = here.key(models=("m*",)), here.key(role=keys.Role.ADMIN)
            client.headers.update(scoped)
            listed = (await client.get("/v1/models")).json()["data"]
            assert [model["id"] for model in listed] == ["m", "m-large"]
            assert (await client.get("/v1/models/m")).json()["id"] == "m"
            assert (await client.get("/v1/models/other")).status_code == 403
            assert (await client.post(CHAT, json=ask(model="other"))).status_code == 403
            unknown = await client.post(CHAT, json=ask(model="m-none"))
            assert unknown.status_code == 404
            assert unknown.json()["error"]["code"] == "model_not_found"
            client.headers.update(admin)
            assert (await client.post(CHAT, json=ask(model=None))).status_code == 400
            for path in ("/v1/load_lora_adapter", "/v1/responses", "/docs", "/metrics", "/"):
                assert (await client.post(path, json={})).status_code == 404
                assert (await client.get(path)).status_code == 404
            assert one.bodies == []

    asyncio.run(run())


# --- addresses -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "path", "where"),
    [
        ("http://h:1/v1", "/v1/chat/completions", "http://h:1/v1/chat/completions"),
        ("http://h:1/v1/", "/score", "http://h:1/score"),
        ("https://h/x/v1", "/v2/rerank", "https://h/x/v2/rerank"),
        ("https://h/openai", "/v1/embeddings", "https://h/openai/embeddings"),
        ("https://h/openai", "/tokenize", None),
    ],
)
def test_routes_lie_beside_v1_as_with_vllm(url: str, path: str, where: str | None) -> None:
    config = GatewayArgs.model_validate({"models": to(url)})
    (upstream,) = targets.served("m", config.models["m"], config.breaker).shared
    assert isinstance(upstream, Upstream)
    assert upstream.url(path, None) == where


@pytest.mark.parametrize(
    "target",
    [
        {},
        {"app": "a", "url": NOBODY},
        {"url": NOBODY, "cluster": "far"},
        {"url": "api.example.com/v1"},
        {"url": "https://user:secret@api.example.com/v1"},
        {"url": "https://api.example.com:99999/v1"},
        {"url": NOBODY, "api_key": "sk-plain"},
        {"app": "a", "api_key_file": "x", "api_key_env": "X"},
        {"app": "a", "weight": 0},
    ],
)
def test_a_target_that_cannot_be_is_refused(target: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        GatewayArgs.model_validate({"models": {"m": {"to": [target]}}})


def test_the_guard_of_a_gateway_is_closed_by_default() -> None:
    assert GatewayArgs.model_validate({"models": to(NOBODY)}).guard == GuardConfig()
