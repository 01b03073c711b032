"""What one user sends must not cost others their answers: no 5xx, no hanging, no dead engine."""

from __future__ import annotations

import itertools
import json
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from .conftest import Site, started_at

pytestmark = pytest.mark.timeout(600)

CHAT, COMPLETION, EMBEDDING = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
REFUSED_WITHIN_S = 5
AT_ONCE = 8
NUM_MIXED = 240


@pytest.fixture(autouse=True)
def unharmed(known: Site) -> Iterator[None]:
    """After each test the same processes answer."""
    before = [started_at(known, prefix) for prefix in ("", "/reader")]
    yield
    assert [started_at(known, prefix) for prefix in ("", "/reader")] == before
    with known.http(known.user) as client:
        assert client.post(COMPLETION, json=completion()).status_code == 200


def completion(**parameters: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": "def", "max_tokens": 4, **parameters}


def chat(**parameters: Any) -> dict[str, Any]:
    said = [{"role": "user", "content": "hi"}]
    return {"model": "tiny", "messages": said, "max_tokens": 8, **parameters}


def constrained(**constraint: Any) -> dict[str, Any]:
    return chat(structured_outputs=constraint)


def arrays(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def tool(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": schema}}


def parts(**content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [content]}]


MANY = {f"p{number}": {"type": "string"} for number in range(2000)}
TOO_MUCH = {
    # Each of them stopped a replica for minutes.
    "deep schema": constrained(json=arrays(300)),
    "deep schema as text": constrained(json=json.dumps(arrays(900))),
    "deep response format": chat(
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "a", "schema": arrays(900)},
        }
    ),
    "deep tool": chat(tools=[tool(arrays(300))], tool_choice="required"),
    "many properties": constrained(json={"type": "object", "properties": MANY}),
    "wide class": constrained(regex="[" + "".join(map(chr, range(0x100, 0x1100))) + "]{50}"),
    "long choice": constrained(choice=["a" * 100_000]),
    "deep grammar": constrained(grammar="root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000),
    "beams' score": completion(use_beam_search=True, n=4, temperature=0, length_penalty=-1e300),
}
UNANSWERABLE = {
    "grammar of nothing": constrained(grammar="root ::= root"),
    "schema of itself": constrained(json={"$ref": "#"}),
    "token that is none": constrained(grammar="root ::= Token(999999)"),
    "no token left": chat(response_format={"type": "json_object"}, allowed_token_ids=[50]),
    "no brace left": chat(response_format={"type": "json_object"}, bad_words=["{"], temperature=0),
}
UNREADABLE = {
    "more than 64 bits": (COMPLETION, completion(top_k=2**64)),
    "in a list": (COMPLETION, completion(vllm_xargs={"a": [2**70]})),
    "in a pattern": (
        COMPLETION,
        completion(
            repetition_detection={"max_pattern_size": 2**64, "min_pattern_size": 1, "min_count": 2}
        ),
    ),
    "a file": (
        CHAT,
        chat(messages=parts(type="image_url", image_url={"url": "file:///etc/passwd"})),
    ),
    "a picture": (CHAT, chat(messages=parts(type="image_url", image_url={"url": "http://[::1]"}))),
    "no such part": (CHAT, chat(messages=parts(type="nonsense"))),
}


@pytest.mark.parametrize("body", TOO_MUCH.values(), ids=TOO_MUCH.keys())
def test_what_would_stop_the_replica_is_refused_at_once(known: Site, body: dict[str, Any]) -> None:
    with known.http(known.user) as client:
        begun = time.monotonic()
        answer = client.post(CHAT if "messages" in body else COMPLETION, json=body)
    assert time.monotonic() - begun < REFUSED_WITHIN_S
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["code"] == "invalid_value"


@pytest.mark.parametrize("body", UNANSWERABLE.values(), ids=UNANSWERABLE.keys())
def test_a_constraint_that_no_answer_keeps_is_the_requests_fault(
    known: Site, body: dict[str, Any]
) -> None:
    with known.http(known.user) as client:
        answer = client.post(CHAT, json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["code"] == "constraint_failed"


@pytest.mark.parametrize(("path", "body"), UNREADABLE.values(), ids=UNREADABLE.keys())
def test_what_vllm_cannot_read_is_the_requests_fault(
    known: Site, path: str, body: dict[str, Any]
) -> None:
    with known.http(known.user) as client:
        answer = client.post(path, json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}],
        [{"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}],
        [{"type": "image_embeds", "image_embeds": "AAAA"}],
        [{"type": "tool_reference", "name": 5}],
        [{"type": "thinking", "thinking": 5}],
    ],
)
def test_a_chat_with_parts_that_the_model_has_not_is_no_failure_of_its(
    known: Site, content: list[dict[str, Any]]
) -> None:
    body = {"model": "reader", "messages": [{"role": "user", "content": content}]}
    with known.http(known.user, "/reader") as client:
        answer = client.post(EMBEDDING, json=body)
    assert answer.status_code < 500, answer.text


def test_what_administrators_send_wrongly_is_the_requests_fault(known: Site) -> None:
    items = [{"type": "function_call_output", "call_id": "x", "output": [5]}, {"type": "message"}]
    with known.http(known.admin) as client:
        for item in ("a", 5, None, [], *items):
            asked = {"model": "tiny", "input": [item], "max_output_tokens": 16}
            answer = client.post("/v1/responses", json=asked)
            assert answer.status_code < 500, answer.text
        told = {
            "model": "tiny",
            "token_ids": [1, 2],
            "sampling_params": {"max_tokens": 1},
            "features": {"mm_hashes": {"image": ["a"]}, "mm_placeholders": {}, "kwargs_data": {}},
        }
        answer = client.post("/inference/v1/generate", json=told)
        assert answer.status_code < 500, answer.text


@pytest.mark.parametrize(
    "parameters", [{"prompt_logprobs": 1}, {"prompt_logprobs": 0}, {"echo": True, "logprobs": 2}]
)
def test_log_probabilities_of_prompts_do_not_end_an_engine_with_adapters(
    known: Site, parameters: dict[str, Any]
) -> None:
    """Among other requests each of them ended vLLM's engine, and with it the replica."""

    def send(number: int) -> int:
        asked = completion(prompt="def main " * 9, max_tokens=60)
        with known.http(known.user) as client:
            both = asked if number % 2 else {**asked, **parameters, "max_tokens": 2}
            return client.post(COMPLETION, json=both).status_code

    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = list(pool.map(send, range(2 * AT_ONCE)))
    assert found == [400, 200] * AT_ONCE


def test_mixed_batches_of_unusual_parameters_are_all_answered(known: Site) -> None:
    """Parameters that vLLM takes, put together at random, eight at a time; some clients leave."""
    made = list(itertools.islice(mixed(random.Random(1)), NUM_MIXED))

    def send(asked: tuple[dict[str, Any], bool]) -> str:
        body, leaves = asked
        path = CHAT if "messages" in body else COMPLETION
        with known.http(known.user) as client:
            try:
                answer = client.post(path, json=body, timeout=0.05 if leaves else 60)
            except httpx.TimeoutException:
                return "" if leaves else f"no answer: {body}"
        return "" if answer.status_code < 500 else f"{answer.text}: {body}"

    with ThreadPoolExecutor(AT_ONCE) as pool:
        wrong = [told for told in pool.map(send, made) if told]
    assert wrong == []


UNUSUAL: dict[str, tuple[Any, ...]] = {
    "temperature": (0, 5e-324, 1e-5, 2.0),
    "top_p": (5e-324, 1e-9, 1.0),
    "top_k": (-1, 1, 10**9, 2**63 - 1),
    "min_p": (5e-324, 1.0),
    "seed": (-(2**63), -1, 2**63 - 1),
    "repetition_penalty": (5e-324, 1e-38, 1e300),
    "frequency_penalty": (-2, 1e-320),
    "n": (1, 4, 16),
    "min_tokens": (0, 2),
    "logit_bias": ({"5": 100}, {str(number): -100 for number in range(250)}),
    "allowed_token_ids": ([0], [5, 6, 270]),
    "bad_words": (["a", "<|end|>"], ["\n"]),
    "stop": ("a", ["\ufffd", "\n"]),
    "stop_token_ids": ([0, 5],),
    "logprob_token_ids": ([5], list(range(100))),
    "truncate_prompt_tokens": (-1, 1),
    "repetition_detection": ({"max_pattern_size": 2**62, "min_pattern_size": 1, "min_count": 2},),
    "stream": (True,),
    "ignore_eos": (True,),
    "structured_outputs": (
        {"regex": "(ab|c)*"},
        {"choice": ["é", "\U0001f600"]},
        {"json": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}},
        {"grammar": 'root ::= "a" root | "b"'},
    ),
}


def mixed(chance: random.Random) -> Iterator[tuple[dict[str, Any], bool]]:
    while True:
        names = chance.sample(sorted(UNUSUAL), chance.choice([1, 2, 3, 5]))
        parameters = {name: chance.choice(UNUSUAL[name]) for name in names}
        num_tokens = chance.choice([1, 2, 8, 60])
        make = chance.choice([chat, completion])
        logprobs = chance.choice([None, 0, 5])
        if logprobs is not None and "logprob_token_ids" not in parameters:
            own = {"logprobs": True, "top_logprobs": logprobs} if make is chat else {}
            parameters |= own or {"logprobs": logprobs}
        yield {**make(**parameters), "max_tokens": num_tokens}, chance.random() < 0.15
