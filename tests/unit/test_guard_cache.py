"""Answers that the guard keeps: which ones, for whom, how long, and what of it lies in memory."""

from __future__ import annotations

import asyncio
import pickle
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.exceptions import InvalidTag
from model_server import ModelServer
from pydantic import ValidationError

from manta.serving.access import key_store, keys, usage
from manta.serving.access.keys import Role
from manta.serving.guard.cache import ENTRY_BYTES, Page, ResponseCache
from manta.serving.guard.guard import Guard
from manta.serving.guard.limiter import LocalLimiter
from manta.serving.telemetry import vitals
from manta.spec.guard import CacheConfig, GuardConfig, Limits, Price

CHAT = "/v1/chat/completions"
PROMPT = "what is in the harbour of Syracuse"


class Lab:
    """The model behind a guard that keeps answers."""

    def __init__(
        self, root: Path, told: vitals.VitalsWriter | None = None, **changes: Any
    ) -> None:
        self.root, self.model = str(root), ModelServer()
        config = GuardConfig.model_validate({"cache": {"ttl_s": 60}, **changes})
        prices = {"m": Price(prompt_usd_per_million=1, completion_usd_per_million=1)}
        self.guard = Guard(
            self.model.app,
            config,
            key_store.KeyTable(self.root),
            LocalLimiter("replica"),
            usage.Ledger(self.root, prices),
            vitals=told,
        )

    def client(self, **changes: Any) -> httpx.AsyncClient:
        """With a new key."""
        key, secret = keys.make(name="a", owner="me", now=time.time(), **changes)
        key_store.save(self.root, key)
        self.guard._table.refresh()
        transport = httpx.ASGITransport(self.guard, raise_app_exceptions=False)
        headers = {"Authorization": f"Bearer {secret}"}
        return httpx.AsyncClient(transport=transport, base_url="http://here", headers=headers)

    @property
    def cache(self) -> ResponseCache:
        assert self.guard._cache is not None
        return self.guard._cache


def chat(text: str = PROMPT, **changes: Any) -> dict[str, Any]:
    message = {"role": "user", "content": text}
    return {"model": "m", "messages": [message], "temperature": 0, **changes}


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., None]:
    """Runs a test's coroutine with a lab."""

    def inner(test: Callable[[Lab], Awaitable[None]], **changes: Any) -> None:
        async def whole() -> None:
            here = Lab(tmp_path, **changes)
            try:
                await test(here)
            finally:
                await here.guard.stop()

        asyncio.run(whole())

    return inner


def is_hit(answer: httpx.Response) -> bool:
    assert answer.status_code == 200, answer.text
    return answer.headers.get("x-manta-cache") == "hit"


def test_the_same_greedy_request_is_answered_once_by_the_model_and_then_from_the_cache(
    run: Callable[..., None],
) -> None:
    async def check(here: Lab) -> None:
        client = here.client()
        first = await client.post(CHAT, json=chat())
        again = await client.post(CHAT, json=chat())
        assert [is_hit(first), is_hit(again)] == [False, True]
        assert again.json() == first.json()
        assert again.headers["x-served-by"] == "m"
        assert "x-request-id" not in again.headers, "it was another request"
        assert int(again.headers["age"]) == 0
        assert len(here.model.asked) == 1

    run(check)


def test_a_stream_comes_again_as_the_same_stream(run: Callable[..., None]) -> None:
    async def check(here: Lab) -> None:
        client = here.client()
        first = await messages(here.guard, client, chat(stream=True))
        again = await messages(here.guard, client, chat(stream=True))
        assert (b"x-manta-cache", b"hit") in again[0]["headers"]
        assert (b"content-type", b"text/event-stream; charset=utf-8") in again[0]["headers"]
        parts = [[one["body"] for one in all_[1:] if one["body"]] for all_ in (first, again)]
        assert parts[0] == parts[1]
        assert len(parts[1]) > 6, "word by word"
        assert [one["more_body"] for one in again[1:]][-2:] == [True, False]
        assert not is_hit(await client.post(CHAT, json=chat())), "without a stream it is another"

    run(check)


async def messages(guard: Guard, client: httpx.AsyncClient, body: Any) -> list[Any]:
    """What the server is told to send, message by message: httpx would join them."""
    request = client.build_request("POST", CHAT, json=body)
    headers = [(name.lower(), value) for name, value in request.headers.raw]
    scope = {"type": "http", "method": "POST", "path": CHAT, "headers": headers}
    asked, sent = [{"type": "http.request", "body": request.content}], []

    async def receive() -> Any:
        return asked.pop() if asked else await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    await guard({**scope, "query_string": b"", "root_path": ""}, receive, send)
    return sent


def test_who_asks_for_the_use_of_a_stream_gets_it_and_who_does_not_does_not(
    run: Callable[..., None],
) -> None:
    async def check(here: Lab) -> None:
        client = here.client()
        plain = chat(stream=True)
        # What the guard makes of the first request, byte for byte.
        told = {**plain, "stream_options": {"include_usage": True}}
        assert '"usage"' not in (await client.post(CHAT, json=plain)).text
        for body, has_usage in ((told, True), (plain, False), (told, True)):
            answer = await client.post(CHAT, json=body)
            assert ('"usage"' in answer.text) is has_usage

    run(check)


@pytest.mark.parametrize(
    ("path", "body", "kept"),
    [
        (CHAT, chat(temperature=0.0), True),
        (CHAT, chat(temperature=1, seed=7), True),
        (CHAT, chat(n=1), True),
        ("/v1/embeddings", {"model": "m", "input": "a"}, True),
        ("/v1/completions", {"model": "m", "prompt": "a", "temperature": 0}, True),
        (CHAT, chat(temperature=0.1), False),
        (CHAT, {"model": "m", "messages": [{"role": "user", "content": "a"}]}, False),
        (CHAT, chat(temperature=False), False),
        (CHAT, chat(temperature=1, seed=None), False),
        (CHAT, chat(n=2), False),
        (CHAT, chat([{"type": "image_url", "image_url": {"url": "https://a/b"}}]), False),
        (CHAT, chat([{"type": "text", "text": "a"}]), True),
        (CHAT, chat(kv_transfer_params={}), False),
    ],
)
def test_only_what_must_have_the_same_answer_is_kept(
    run: Callable[..., None], path: str, body: dict[str, Any], kept: bool
) -> None:
    async def check(here: Lab) -> None:
        client = here.client()
        answers = [await client.post(path, json=body) for _ in range(2)]
        assert [is_hit(answer) for answer in answers] == [False, kept]

    run(check)


def test_another_request_key_or_header_is_another_answer(run: Callable[..., None]) -> None:
    async def check(here: Lab) -> None:
        one, other = here.client(), here.client()
        assert not is_hit(await one.post(CHAT, json=chat()))
        assert not is_hit(await one.post(CHAT, json=chat(PROMPT + "?")))
        assert not is_hit(await one.post(CHAT, json=chat(max_tokens=9)))
        assert not is_hit(await one.post(CHAT + "?a=1", json=chat()))
        assert not is_hit(await one.post(CHAT, json=chat(), headers={"accept": "text/plain"}))
        assert not is_hit(await other.post(CHAT, json=chat())), "a key never sees another's"
        assert is_hit(await one.post(CHAT, json=chat()))

    run(check)


def test_a_client_can_ask_past_the_cache(run: Callable[..., None]) -> None:
    async def check(here: Lab) -> None:
        client = here.client()
        for word in ("no-store", "no-cache"):
            for _ in range(2):
                answer = await client.post(CHAT, json=chat(), headers={"cache-control": word})
                assert not is_hit(answer)
        assert here.cache.num_bytes == 0

    run(check)


@pytest.mark.parametrize("fault", ["status", "abort"])
def test_an_answer_that_went_wrong_is_never_kept(run: Callable[..., None], fault: str) -> None:
    async def check(here: Lab) -> None:
        client = here.client()
        here.model.fault = fault
        await client.post(CHAT, json=chat())
        here.model.fault = None
        assert not is_hit(await client.post(CHAT, json=chat()))
        assert not is_hit(await client.post(CHAT, json=chat(max_tokens=1)))
        assert (await client.post(CHAT, json={"temperature": 0})).status_code == 422
        assert len(here.cache._entries) == 2

    run(check)


@pytest.mark.parametrize("fault", ["cut", "event", "late", "left"])
def test_a_stream_that_is_cut_is_never_kept(run: Callable[..., None], fault: str) -> None:
    async def check(here: Lab) -> None:
        client = here.client()
        here.model.fault = fault
        if fault in ("late", "left"):
            here.model.hold.clear()
        asking = asyncio.create_task(client.post(CHAT, json=chat(stream=True)))
        if fault == "left":
            while not here.model.num_running:
                await asyncio.sleep(0.01)
            asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        here.model.hold.set()
        assert here.cache.num_bytes == 0
        here.model.fault = None
        assert not is_hit(await client.post(CHAT, json=chat(stream=True)))
        assert is_hit(await client.post(CHAT, json=chat(stream=True)))

    run(check, request_timeout_s=0.5)


def test_two_identical_requests_at_once_are_both_answered_and_one_answer_is_kept(
    run: Callable[..., None],
) -> None:
    async def check(here: Lab) -> None:
        client = here.client()
        here.model.hold.clear()
        both = [asyncio.create_task(client.post(CHAT, json=chat())) for _ in range(2)]
        while len(here.model.asked) < 2:
            await asyncio.sleep(0.01)
        here.model.hold.set()
        answers = [await one for one in both]
        assert not any(map(is_hit, answers))
        assert len(here.cache._entries) == 1
        (entry,) = here.cache._entries.values()
        assert here.cache.num_bytes == len(entry.sealed) + ENTRY_BYTES
        again = await client.post(CHAT, json=chat())
        assert is_hit(again)
        assert again.json() in [answer.json() for answer in answers]

    run(check)


def test_a_call_that_may_change_models_empties_it_also_of_what_is_just_being_answered(
    run: Callable[..., None],
) -> None:
    async def check(here: Lab) -> None:
        client, admin = here.client(), here.client(role=Role.ADMIN)
        await client.post(CHAT, json=chat())
        here.model.hold.clear()
        slow = asyncio.create_task(client.post(CHAT, json=chat("slow")))
        while len(here.model.asked) < 2:
            await asyncio.sleep(0.01)
        assert (await admin.post("/v1/load_lora_adapter", json={})).status_code == 200
        here.model.hold.set()
        await slow
        assert not is_hit(await client.post(CHAT, json=chat("slow")))
        assert not is_hit(await client.post(CHAT, json=chat()))

    run(check)


def test_a_hit_counts_as_a_request_but_costs_no_tokens(run: Callable[..., None]) -> None:
    async def check(here: Lab) -> None:
        limits = Limits(requests_per_min=4, tokens_per_min=40)
        client = here.client(limits=limits)
        first = await client.post(CHAT, json=chat(max_tokens=9))
        # As much again is not left of the tokens, but nothing more is needed.
        for _ in range(3):
            assert is_hit(await client.post(CHAT, json=chat(max_tokens=9)))
        assert (await client.post(CHAT, json=chat(max_tokens=9))).status_code == 429
        await here.guard.stop()
        (used,) = usage.read(here.root, usage.month_of(time.time()))
        tokens = first.json()["usage"]
        assert (used.num_requests, used.num_cached) == (4, 3)
        assert used.prompt_tokens == tokens["prompt_tokens"]
        assert used.completion_tokens == tokens["completion_tokens"]
        assert used.cost_usd == pytest.approx(sum(tokens.values()) / 1e6)

    run(check)


def test_a_key_whose_money_is_spent_gets_429_until_the_month_ends(
    run: Callable[..., None],
) -> None:
    async def check(here: Lab) -> None:
        client = here.client(limits=Limits(usd_per_month=0.00005))
        body = {"model": "m", "prompt": "a", "max_tokens": 8}  # 10 tokens reserved, 14 used
        codes = [(await client.post("/v1/completions", json=body)).status_code for _ in range(5)]
        assert codes == [200, 200, 200, 429, 429], "of 14 millionths of a dollar each"
        denied = await client.post("/v1/completions", json=body)
        assert denied.json()["error"]["code"] == "insufficient_quota"
        assert int(denied.headers["retry-after"]) > 0
        free = {**body, "model": "unpriced"}
        assert (await client.post("/v1/completions", json=free)).status_code == 200
        await here.guard.stop()
        spent = usage.spent_by_key(here.root, usage.month_of(time.time()))
        assert [one.cost_usd for one in spent.values()] == [pytest.approx(42e-6)]

    run(check)


def test_answers_from_the_cache_are_no_sign_of_how_a_version_does(tmp_path: Path) -> None:
    async def check() -> None:
        here = Lab(tmp_path, vitals.VitalsWriter(str(tmp_path), "replica"))
        client = here.client()
        for _ in range(3):
            await client.post(CHAT, json=chat())
        await here.guard.stop()
        assert vitals.read(here.root, ["replica"]).num_requests == 1

    asyncio.run(check())


def test_neither_prompts_nor_answers_nor_what_opens_them_lie_in_the_cache(
    run: Callable[..., None],
) -> None:
    async def check(here: Lab) -> None:
        client = here.client()
        await client.post(CHAT, json=chat())
        held = pickle.dumps(here.cache)
        assert here.cache.num_bytes > ENTRY_BYTES
        secret = client.headers["authorization"].split()[1].encode()
        for text in (PROMPT.encode(), b"thank you", b"choices", secret):
            assert text not in held
        # With all that is in memory, but another secret than the client's, nothing opens.
        ((index, entry),) = here.cache._entries.items()
        page = here.cache.page(secret[:-1] + b"x", b"anything")
        with pytest.raises(InvalidTag):
            page._open(entry.sealed)
        assert Page(here.cache, page._key, index[::-1]).answer is None

    run(check)


def test_the_cache_stays_within_its_bytes_and_drops_what_was_unused_longest() -> None:
    cache = ResponseCache(CacheConfig(max_bytes=2**16, ttl_s=60))
    size = 2**14 - ENTRY_BYTES
    for number in range(4):
        cache.put(b"%d" % number, bytes(size), 0)
    assert cache.num_bytes == 2**16
    assert cache.get(b"0", 1) is not None
    cache.put(b"4", bytes(size), 1)
    assert [cache.get(b"%d" % n, 1) is not None for n in range(5)] == [True, False, *[True] * 3]
    cache.put(b"5", bytes(2**17), 1)
    assert cache.get(b"5", 1) is None
    assert cache.num_bytes <= 2**16


def test_an_answer_is_gone_after_its_time_also_if_nobody_asks() -> None:
    cache = ResponseCache(CacheConfig(max_bytes=2**16, ttl_s=60))
    cache.put(b"a", b"x", 0)
    cache.put(b"b", b"x", 30)
    cache.put(b"a", b"y", 50)  # renewed: its first age no longer counts
    cache.sweep(61)
    assert len(cache._entries) == 2
    cache.sweep(91)
    assert list(cache._entries) == [b"a"]
    cache.sweep(110)
    assert (len(cache._entries), cache.num_bytes) == (0, 0)


def test_a_large_answer_passes_and_is_not_kept(run: Callable[..., None]) -> None:
    async def check(here: Lab) -> None:
        here.model.words = "word " * 2000
        client = here.client()
        for _ in range(2):
            assert not is_hit(await client.post(CHAT, json=chat()))
        assert here.cache.num_bytes == 0

    run(check, cache={"max_bytes": 2**16})


def test_a_cache_without_keys_is_refused_and_none_is_kept_unless_asked_for() -> None:
    with pytest.raises(ValidationError, match="needs `keys: required`"):
        GuardConfig.model_validate({"keys": "none", "cache": {}})
    assert GuardConfig().cache is None
