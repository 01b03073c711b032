"""What the guard writes down of prompts and answers: nothing unless asked, never for ever."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from model_server import ModelServer
from pydantic import ValidationError

from manta.serving.access import key_store, keys, usage
from manta.serving.guard import prompt_log
from manta.serving.guard.guard import Guard
from manta.serving.guard.limiter import LocalLimiter
from manta.serving.guard.prompt_log import DAY_S, PromptLog
from manta.serving.guard.redact import NAMES, Redactor
from manta.spec.guard import GuardConfig, Limits

CHAT = "/v1/chat/completions"
CANARY = "canary-7c1f"


class Lab:
    """The model behind a guard."""

    def __init__(self, root: Path, **config: Any) -> None:
        self.root, self.model = root, ModelServer()
        self.guard = Guard(
            self.model.app,
            GuardConfig.model_validate(config),
            key_store.KeyTable(str(root)),
            LocalLimiter("replica"),
            usage.Ledger(str(root), {}),
        )
        limits = Limits(requests_per_min=100)
        key, secret = keys.make(name="a", owner="me", now=time.time(), limits=limits)
        key_store.save(str(root), key)
        self.client = httpx.AsyncClient(
            transport=httpx.ASGITransport(self.guard, raise_app_exceptions=False),
            base_url="http://here",
            headers={"Authorization": f"Bearer {secret}"},
        )

    def logged(self) -> list[dict[str, Any]]:
        """What lies in the storage."""
        files = sorted(self.root.glob("prompts/*/*.jsonl"))
        return [json.loads(line) for file in files for line in file.read_text().splitlines()]


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Lab]:
    """Runs a test's coroutine with a lab, to its end."""

    def inner(test: Callable[[Lab], Awaitable[None]], **config: Any) -> Lab:
        async def whole() -> Lab:
            here = Lab(tmp_path, **config)
            try:
                await test(here)
            finally:
                await here.guard.stop()
            return here

        return asyncio.run(whole())

    return inner


def chat(text: Any, **changes: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": text}], **changes}


async def talk(here: Lab) -> None:
    """Everything that a request can meet, each with the canary in it."""
    here.model.words = f"well , {CANARY}"
    for body in (chat(CANARY), chat(CANARY, stream=True), chat(CANARY, temperature=0)):
        for _ in range(2):
            assert (await here.client.post(CHAT, json=body)).status_code == 200
    for fault in ("status", "cut", "event"):
        here.model.fault = fault
        await here.client.post(CHAT, json=chat(CANARY, stream=fault != "status"))
    here.model.fault = None
    for wrong in (chat(CANARY, n=99), chat(CANARY, max_tokens=-1), chat(7, user=CANARY)):
        assert (await here.client.post(CHAT, json=wrong)).status_code in (400, 422)
    await here.client.post(CHAT, content=f'{{"{CANARY}'.encode())
    await here.client.post(f"/{CANARY}", json=chat(CANARY))
    here.model.hold.clear()
    await here.client.post(CHAT, json=chat(CANARY))
    here.model.hold.set()


@pytest.mark.parametrize("cache", [None, {}])
def test_by_default_no_prompt_or_answer_is_in_any_file_or_log(
    run: Callable[..., Lab], caplog: pytest.LogCaptureFixture, tmp_path: Path, cache: Any
) -> None:
    caplog.set_level(logging.DEBUG)
    here = run(talk, cache=cache, request_timeout_s=0.5)
    told = "\n".join([record.getMessage() + str(record.exc_text) for record in caplog.records])
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) >= 2, "a key and its use"
    told += "".join(file.read_text() + str(file) for file in files)
    assert CANARY not in told.replace(f"/{CANARY}", "")
    assert here.logged() == []


def test_if_asked_prompts_and_answers_are_written_whole_but_without_what_is_to_be_left_out(
    run: Callable[..., Lab],
) -> None:
    async def check(here: Lab) -> None:
        here.model.words = "write to ann@ example.org or ann@example.org"
        text = "I am bob@example.org, 4111 1111 1111 1111, +49 30 901820, project Narwhal"
        await here.client.post(CHAT, json=chat(text, stream=True))
        await here.client.post(CHAT, json=chat(text))

    here = run(check, log_prompts={"sample": 1, "patterns": ["Nar\\w+"]})
    stream, plain = here.logged()
    for record in (stream, plain):
        (message,) = record["request"]["messages"]
        assert message["content"] == "I am [email], [card], [phone], project [redacted]"
        assert (record["status"], record["whole"], record["path"]) == (200, True, CHAT)
        assert abs(record["at"] - time.time()) < 60
    assert stream["answer"] == ["write to ann@ example.org or [email] 1 "]
    assert plain["answer"] == ["write to ann@ example.org or [email] 2"]
    used = usage.read(str(here.root), usage.month_of(time.time()))
    assert {stream["key_id"], plain["key_id"]} == {used[0].key_id}


def test_what_is_split_between_events_is_put_together_before_it_is_redacted() -> None:
    log = PromptLog("", GuardConfig(log_prompts={"sample": 1}).log_prompts)  # type: ignore[arg-type]
    record = log.record("k", CHAT, b"{}")
    assert record is not None
    headers = [(b"Content-Type", b"text/event-stream")]
    record.hear({"type": "http.response.start", "status": 200, "headers": headers})
    for part in ("a", "nn@exa", "mple.o", "rg"):
        tool = {"index": 0, "function": {"arguments": part}}
        delta = {"content": part, "reasoning": part, "tool_calls": [tool]}
        choices = [{"index": 0, "delta": delta}, {"index": 1, "delta": {"content": part}}]
        event = f"data: {json.dumps({'choices': choices})}\n\n".encode()
        record.hear({"type": "http.response.body", "body": event, "more_body": True})
    line = record.line(Redactor(NAMES, []))
    assert line is not None
    assert json.loads(line)["answer"] == ["[email]"] * 4
    assert json.loads(line)["whole"] is False


def test_about_as_many_are_written_as_the_sample_says(run: Callable[..., Lab]) -> None:
    async def check(here: Lab) -> None:
        for _ in range(90):
            await here.client.post(CHAT, json=chat("a"))

    here = run(check, log_prompts={"sample": 0.3})
    assert 5 <= len(here.logged()) <= 55, "27 are to be expected; five deviations each way"


def test_what_cannot_be_redacted_is_left_out(run: Callable[..., Lab]) -> None:
    async def check(here: Lab) -> None:
        picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
        await here.client.post(CHAT, json=chat([picture]))
        body = {"model": "m", "prompt": [1, 2, 3], "max_tokens": 1}
        await here.client.post("/v1/completions", json=body)
        form = {"content-type": "multipart/form-data; boundary=a"}
        sound = "/v1/audio/transcriptions"
        await here.client.post(sound, content=b"--a\r\nsecret", headers=form)
        here.model.words = "a" * 2**20
        await here.client.post(CHAT, json=chat("short"))

    one, two, three = run(check, log_prompts={"sample": 1}).logged()
    assert one["request"]["messages"][0]["content"][0]["image_url"] == {"url": "[26 characters]"}
    assert two["request"]["prompt"] == "[3 token ids]"
    assert three["answer"] == "[over 1048576 bytes]"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("ann.b+c@mail.example.org!", "[email]!"),
        ("(030) 901820-12", "[phone]"),
        ("call 0049 170 1234567.", "call [phone]."),
        ("5500-0000-0000-0004", "[card]"),
        ("manta_0123456789ab_" + "x" * 43, "[key]"),
        ("use sk-proj-abcdefghijklmnop1234", "use [key]"),
        ("AKIAABCDEFGHIJKLMNOP", "[key]"),
        ("Authorization: Bearer abcdefghijklmnopqrst", "Authorization: [key]"),
        ("password = hunter22 ok", "[key] ok"),
        ("-----BEGIN RSA PRIVATE KEY-----\nabc\n-----END RSA PRIVATE KEY-----", "[key]"),
        ("version 1.24.3 of 2 files, 12 %", "version 1.24.3 of 2 files, 12 %"),
        ("a token is a word; snake_case_name", "a token is a word; snake_case_name"),
    ],
)
def test_what_is_taken_out_and_what_stays(text: str, left: str) -> None:
    assert Redactor(NAMES, []).value({"a": [text]}) == {"a": [left]}


def test_names_and_numbers_are_redacted_as_texts_are() -> None:
    value = {"ann@example.org": 4111111111111111, "n": 12, "b": True, "x": None}
    assert Redactor(NAMES, []).value(value) == {"[email]": "[card]", "n": 12, "b": True, "x": None}


@pytest.mark.parametrize(
    "piece",
    ["a", "a@", "a.", "1", "1 ", "(1", "eyJ", "eyJ-", "sk-", "bearer ", "token", "-----BEGIN "],
)
def test_no_text_makes_redacting_take_quadratic_time(piece: str) -> None:
    text = piece * (400_000 // len(piece))  # squared this is hours, and the test's time is up
    Redactor(NAMES, []).text(text)


def test_records_are_deleted_when_they_have_had_their_time_by_any_guard(
    run: Callable[..., Lab], tmp_path: Path
) -> None:
    async def check(here: Lab) -> None:
        await here.client.post(CHAT, json=chat("a"))

    here = run(check, log_prompts={"sample": 1, "keep_days": 3})
    assert len(here.logged()) == 1
    now = time.time()
    prompt_log.sweep(str(tmp_path), now + 3 * DAY_S - 3700)
    assert len(here.logged()) == 1
    prompt_log.sweep(str(tmp_path), now + 3 * DAY_S)
    assert here.logged() == []
    (tmp_path / "prompts" / "until-2020-01-01T00").mkdir(parents=True)
    (tmp_path / "prompts" / "until-2020-01-01T00" / "x.jsonl").write_text("{}\n")

    async def idle(here: Lab) -> None:
        await here.client.get("/v1/models")

    run(idle)  # without a prompt log of its own
    assert here.logged() == []


def test_records_wait_while_the_storage_cannot_be_written_and_only_so_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_log, "MAX_WAITING_BYTES", 2**20)
    config = GuardConfig.model_validate({"log_prompts": {"sample": 1}}).log_prompts
    (tmp_path / "prompts").write_text("a file where the folder should be")
    log = PromptLog(str(tmp_path), config)
    for number in range(20):
        record = log.record("k", CHAT, json.dumps(chat("x" * 2**16, user=str(number))).encode())
        assert record is not None
        record.close()
    with pytest.raises(Exception, match="prompts"):
        log.work(last=True)
    (tmp_path / "prompts").unlink()
    log.work(last=True)
    (file,) = tmp_path.glob("prompts/*/*.jsonl")
    assert len(file.read_text().splitlines()) == 15


def test_a_pattern_that_is_none_is_refused_where_it_is_written() -> None:
    with pytest.raises(ValidationError, match="no regular expression"):
        GuardConfig.model_validate({"log_prompts": {"patterns": ["("]}})
    with pytest.raises(ValidationError, match="sample"):
        GuardConfig.model_validate({"log_prompts": {"sample": 2}})
