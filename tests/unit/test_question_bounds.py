"""What the guard refuses of grammars, pictures and forms before an engine sees them."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from manta.serving.openai_errors import Refused
from manta.serving.request import constraints, question
from manta.serving.request.meter import SOUND_TOKENS_PER_S, Meter
from manta.serving.request.question import Question
from manta.spec.guard import GuardConfig

CHAT = "/v1/chat/completions"
BOUNDS = GuardConfig(max_media=3, media_tokens=500)


def read(**body: Any) -> Question:
    return question.read(json.dumps({"model": "m", **body}).encode(), CHAT, BOUNDS)


def refused(**body: Any) -> str:
    with pytest.raises(Refused) as told:
        read(**body)
    assert told.value.status == 400
    return str(told.value.error["message"])


def nested(depth: int) -> Any:
    value: Any = {}
    for _ in range(depth):
        value = {"items": value}
    return value


def test_a_schema_may_nest_only_so_deep_wherever_it_stands() -> None:
    deep, fine = nested(constraints.MAX_DEPTH + 1), nested(constraints.MAX_DEPTH - 3)
    read(structured_outputs={"json": fine})
    for body in (
        {"structured_outputs": {"json": deep}},
        {"structured_outputs": {"json": json.dumps(deep)}},
        {"structured_outputs": {"structural_tag": json.dumps({"format": {"json_schema": deep}})}},
        {"tools": [{"type": "function", "function": {"parameters": deep}}]},
        {"sampling_params": {"structured_outputs": {"json": json.dumps(deep)}}},
        {"anything": deep},
    ):
        assert "nests deeper than" in refused(**body)


@pytest.mark.parametrize(
    "constraint",
    [
        {"regex": "a" * (constraints.MAX_PATTERN_CHARS + 1)},
        {"json": {"pattern": "a" * (constraints.MAX_PATTERN_CHARS + 1)}},
        {"json": json.dumps({"pattern": "a" * (constraints.MAX_PATTERN_CHARS + 1)})},
        {"grammar": "a" * (constraints.MAX_GRAMMAR_CHARS + 1)},
        {"choice": ["a"] * (constraints.MAX_GRAMMAR_CHARS + 1)},
        {"json": {"properties": {f"p{n}": {} for n in range(constraints.MAX_MEMBERS + 1)}}},
        {"json": {"anyOf": [{}] * (constraints.MAX_MEMBERS + 1)}},
    ],
)
def test_what_takes_the_compiler_too_long_is_refused(constraint: dict[str, Any]) -> None:
    assert "at most" in refused(structured_outputs=constraint)


def test_long_lists_that_are_no_grammar_pass() -> None:
    ids = list(range(1000))
    read(logit_bias=dict.fromkeys(map(str, ids), 1), allowed_token_ids=ids)
    read(structured_outputs={"choice": [f"choice {number}" for number in ids]})
    read(sampling_params={"allowed_token_ids": ids, "stop_token_ids": ids})


def picture(url: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def test_each_picture_and_sound_is_reserved_for_and_counted() -> None:
    parts = [picture("data:a"), picture("HTTPS://a/b"), {"type": "input_audio", "input_audio": {}}]
    said = [{"role": "user", "content": [{"type": "text", "text": "abc"}, *parts]}]
    plain = read(messages=[{"role": "user", "content": "abc"}])
    assert read(messages=said).num_prompt_tokens == plain.num_prompt_tokens + 3 * 500
    said[0]["content"] += [picture("data:a")]  # type: ignore[operator]
    assert "4 pictures and sounds; at most 3" in refused(messages=said)


@pytest.mark.parametrize("url", ["file:///etc/passwd", "FILE:/etc/passwd", "ftp://a/b", "a", ""])
@pytest.mark.parametrize("field", ["messages", "input", "text_1", "items"])
def test_addresses_that_are_neither_data_nor_http_are_refused_wherever_they_stand(
    url: str, field: str
) -> None:
    assert "neither a data: URL" in refused(**{field: [{"content": [picture(url)]}]})
    assert "neither a data: URL" in refused(**{field: {"content": [{"image_url": url}]}})


def test_properties_of_a_tool_may_have_such_names() -> None:
    schema = {"properties": {"image_url": {"type": "string"}, "url": {"image_url": "a"}}}
    assert read(tools=[{"function": {"parameters": schema}}]).num_prompt_tokens == 1


@pytest.mark.parametrize("exponent", [1e300, -1e300, 11])
def test_a_score_of_beams_stays_a_number(exponent: float) -> None:
    assert "`length_penalty`" in refused(length_penalty=exponent)


def form(*heads: str, kind: str = "multipart/form-data; boundary=x") -> Question:
    body = b"".join(f"--x\r\n{head}\r\n\r\nears\r\n".encode() for head in heads) + b"--x--\r\n"
    scope = {"headers": [(b"content-type", kind.encode())]}
    return question.read_form(scope, body, BOUNDS)


MODEL = 'Content-Disposition: form-data; name="model"'


def test_a_form_names_its_model_and_reserves_for_its_sound() -> None:
    asked = form('Content-Disposition: form-data; name="file"; filename="a.wav"', MODEL)
    assert (asked.model, asked.num_prompt_tokens, asked.is_sound) == ("ears", 500, True)


@pytest.mark.parametrize(
    "head",
    [
        MODEL,
        "Content-Disposition: form-data; name*=utf-8''model",
        "Content-Disposition: form-data; name*0=mo; name*1=del",
        'Content-Disposition: form-data; name="a"; name="model"',
        f'Content-Disposition: form-data; name="a"\r\n{MODEL}',
        "Content-Disposition: form-data; name=a; filename=\"; name='model'\"",
    ],
)
def test_a_form_that_others_may_read_otherwise_is_refused(head: str) -> None:
    with pytest.raises(Refused):
        form(MODEL, head)
    with pytest.raises(Refused):
        form(MODEL, kind="multipart/form-data; boundary=x; boundary=y")


@pytest.mark.parametrize(
    ("answer", "tokens"),
    [
        (b'{"text": "a", "usage": {"type": "duration", "seconds": 3}}', 3 * SOUND_TOKENS_PER_S),
        (b'{"text": "a", "usage": {"prompt_tokens": 7}}', 7),
        (b'{"text": "a"}', 500),
    ],
)
def test_a_sound_counts_what_the_engine_says_or_what_was_reserved(
    answer: bytes, tokens: int
) -> None:
    async def hear() -> Meter:
        async def send(message: Any) -> None:
            pass

        meter = Meter(send, form(MODEL))
        await meter.send({"type": "http.response.start", "status": 200, "headers": []})
        await meter.send({"type": "http.response.body", "body": answer})
        return meter

    assert asyncio.run(hear()).tokens() == (tokens, 0)
