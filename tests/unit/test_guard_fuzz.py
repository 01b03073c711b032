"""The guard under thousands of requests made from the OpenAPI document of what it guards.

MANTA_FUZZ_REQUESTS=20000 MANTA_FUZZ_SEED=7 pytest -s tests/unit/test_guard_fuzz.py
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from model_server import ModelServer
from openapi_fuzz import BODIES, TEXTS, Call, Maker

from manta.serving.access import key_store, keys, usage
from manta.serving.access.keys import Role
from manta.serving.guard.guard import Guard
from manta.serving.guard.limiter import LocalLimiter
from manta.spec.guard import GuardConfig, Limits, Price

NUM_REQUESTS = int(os.environ.get("MANTA_FUZZ_REQUESTS", "3000"))
SEED = int(os.environ.get("MANTA_FUZZ_SEED", "1"))
AT_ONCE = 8

# Everything on, and bounds that some requests pass.
CONFIG = GuardConfig.model_validate(
    {
        "max_body_bytes": 2**17,
        "max_prompt_chars": 20_000,
        "cache": {"max_bytes": 2**20, "ttl_s": 1},
        "log_prompts": {"sample": 1},
        "chat_page": True,
    }
)


class Endpoint:
    """The guarded model, and keys of each kind."""

    def __init__(self, root: Path) -> None:
        self.root = str(root)
        prices = {"m": Price(prompt_usd_per_million=1)}
        self.guard = Guard(
            ModelServer("ok").app,
            CONFIG,
            key_store.KeyTable(self.root),
            LocalLimiter("replica"),
            usage.Ledger(self.root, prices),
        )
        limits = Limits(tokens_per_min=10**9, usd_per_month=10**9)
        self.admin = self.key(role=Role.ADMIN)
        good = [self.key(), self.key(models=("m*",)), self.key(limits=limits)]
        few = self.key(limits=Limits(requests_per_min=9, concurrent_requests=1))
        self.secrets = [*good * 3, few, self.key(role=Role.VIEWER), self.admin]
        self.client = self.connect()

    def key(self, **changes: Any) -> str:
        key, secret = keys.make(name="a", owner="me", now=time.time(), **changes)
        key_store.save(self.root, key)
        return secret

    def connect(self) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(self.guard, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://here")

    def headers(self) -> list[dict[str, str]]:
        good = [{"Authorization": f"Bearer {secret}"} for secret in self.secrets]
        odd: list[dict[str, str]] = [
            {},
            {"Authorization": "Bearer \u00e4"},
            {"Authorization": "x" * 5000},
            {**good[0], "Cache-Control": "\u00e4 no-"},
            {**good[0], "Accept": "\u00e4", "Accept-Encoding": "br;q=x"},
            {**good[0], "Content-Length": "-1"},
            {**good[0], "serve_multiplexed_model_id": "\u00e4"},
        ]
        return good * 3 + odd

    async def ask(self, call: Call) -> httpx.Response:
        headers = [(k.encode(), v.encode("latin-1")) for k, v in call.headers.items()]
        return await self.client.request(
            call.method, call.url, headers=headers, content=call.content
        )


def test_no_request_made_from_the_document_gets_a_5xx(tmp_path: Path) -> None:
    asyncio.run(_fuzz(Endpoint(tmp_path)))


async def _fuzz(endpoint: Endpoint) -> None:
    admin = {"Authorization": f"Bearer {endpoint.admin}"}
    document = (await endpoint.client.get("/openapi.json", headers=admin)).json()
    chance = random.Random(SEED)
    known = {"model": ["m", "other"], "prompt": ["hello"], "input": ["hello"]}
    maker = Maker(document, chance, known, endpoint.headers())
    asked = list(maker.operations)
    body = {"requestBody": {"content": {"application/json": {"schema": {}}}}}
    maker.operations += [("/chat", "get", {}), ("/no/such/route", "post", body)]
    calls = [_odder(maker.call(), chance) for _ in range(NUM_REQUESTS)]
    answers: dict[str, Counter[int]] = defaultdict(Counter)
    faults: list[str] = []

    async def work(mine: list[Call]) -> None:
        for call in mine:
            answer = await endpoint.ask(call)
            answers[call.operation][answer.status_code] += 1
            if answer.status_code >= 500:
                what = f"{call.operation} {call.headers} {call.content[:300]!r}"
                faults.append(f"{what}: {answer.status_code} {answer.text[:300]}")
            elif answer.status_code >= 400:
                assert set(answer.json()) & {"error", "detail"}, answer.text

    await asyncio.gather(*(work(calls[n::AT_ONCE]) for n in range(AT_ONCE)))
    await endpoint.guard.stop()
    print(f"\n{NUM_REQUESTS} requests, seed {SEED}")
    for operation, statuses in sorted(answers.items()):
        print(f"  {operation:32} {dict(sorted(statuses.items()))}")
    assert faults == [], f"{len(faults)} with seed {SEED}"
    for path, method, _ in asked:
        assert answers[f"{method} {path}"][200], f"{method} {path} did what it is for"
    assert {429, 401, 403, 413, 400} <= set().union(*answers.values())
    # What was accepted has been counted, and everything was let go again.
    assert sum(row.num_requests for row in usage.read(endpoint.root, _month())) > 0
    assert endpoint.guard._in_flight == 0
    logged = list(Path(endpoint.root).glob("prompts/*/*.jsonl"))
    assert sum(len(file.read_text().splitlines()) for file in logged) > NUM_REQUESTS / 20


def _odder(call: Call, chance: random.Random) -> Call:
    """Now and then a body or a query that the document knows nothing of."""
    if chance.random() < 0.02:
        return Call(call.operation, call.method, call.url, call.headers, chance.choice(BODIES))
    if chance.random() < 0.02:
        url = f"{call.url}?{quote(chance.choice(TEXTS))}"
        return Call(call.operation, call.method, url, call.headers, call.content)
    return call


def _month() -> str:
    return usage.month_of(time.time())


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"prompt": "\\ud83e\\udd88 \xf0\x9f\xa6\x88", "seed": 1e3}', 200),
        (b'{"prompt": "\\\\ud800"}', 200),
        (b'{"prompt": "\\ud800"}', 400),
        (b'{"prompt": "\\uDFFF\\uD800"}', 400),
        (b'{"prompt": "\xed\xa0\x80"}', 400),
        ('{"prompt": "\\ud800"}'.encode("utf-16"), 400),
        (b'{"prompt": "\xff"}', 400),
        (b'{"prompt": "a", "temperature": NaN}', 400),
        (b'{"prompt": "a", "temperature": -Infinity}', 400),
        (b'{"prompt": "a", "temperature": 1e999}', 400),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", 400),
        (b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}", 400),
    ],
)
def test_what_is_no_json_for_everybody_goes_no_further(
    tmp_path: Path, body: bytes, status: int
) -> None:
    async def check() -> None:
        endpoint = Endpoint(tmp_path)
        headers = {"Authorization": f"Bearer {endpoint.admin}", "Content-Type": "application/json"}
        answer = await endpoint.client.post("/v1/completions", content=body, headers=headers)
        assert answer.status_code == status, answer.text
        await endpoint.guard.stop()

    asyncio.run(check())
