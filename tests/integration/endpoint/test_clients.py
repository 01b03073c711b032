"""The endpoint as OpenAI's own client, LangChain and plain HTTP see it: docs/clients.md."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any, Literal

import httpx
import openai
import pytest
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel, SecretStr

from .conftest import Site

pytestmark = pytest.mark.timeout(900)

SAID: Any = [{"role": "user", "content": "def main("}]
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"unit": {"type": "string", "enum": ["C", "F"]}},
            "required": ["unit"],
            "additionalProperties": False,
        },
    },
}


class Answer(BaseModel):
    """What structured output is asked for: bounded, as the model is untrained."""

    verdict: Literal["yes", "no"]
    score: Literal[1, 2, 3]


Ask = Callable[[Callable[[Any], Any]], Any]
"""Calls a client, and gives what it answers; of a stream the list of its events."""


@pytest.fixture(params=["sync", "async"])
def ask(request: pytest.FixtureRequest, known: Site) -> Ask:
    settings: Any = {"base_url": f"{known.url}/v1", "api_key": known.user, "max_retries": 0}

    async def later(call: Callable[[Any], Any]) -> Any:
        async with openai.AsyncOpenAI(**settings) as client:
            answer = await call(client)
            return [one async for one in answer] if hasattr(answer, "__aiter__") else answer

    def now(call: Callable[[Any], Any]) -> Any:
        with openai.OpenAI(**settings) as client:
            answer = call(client)
            return list(answer) if isinstance(answer, openai.Stream) else answer

    return now if request.param == "sync" else lambda call: asyncio.run(later(call))


def chat(**changes: Any) -> Callable[[Any], Any]:
    asked = {"model": "tiny", "messages": SAID, "max_tokens": 8, "temperature": 0, **changes}
    return lambda client: client.chat.completions.create(**asked)


def complete(**changes: Any) -> Callable[[Any], Any]:
    asked = {"model": "tiny", "prompt": "def main(", "max_tokens": 8, "temperature": 0, **changes}
    return lambda client: client.completions.create(**asked)


# --- OpenAI's client -------------------------------------------------------------------------


def test_models_are_listed_and_one_is_found(ask: Ask) -> None:
    def both(client: Any) -> Any:
        return client.models.retrieve("tiny")

    assert ask(both).id == "tiny"
    listed = ask(lambda client: client.models.list())
    assert "tiny" in [model.id for model in listed]


def test_a_chat_and_a_completion_say_what_they_used(ask: Ask) -> None:
    said = ask(chat(extra_body={"ignore_eos": True}))
    assert said.choices[0].finish_reason == "length"
    assert said.usage.completion_tokens == 8
    written = ask(complete(extra_body={"ignore_eos": True}))
    assert written.usage.completion_tokens == 8
    assert written.usage.total_tokens == 8 + written.usage.prompt_tokens


@pytest.mark.parametrize("wanted", [True, False])
def test_a_stream_ends_with_its_use_if_that_is_asked_for(ask: Ask, wanted: bool) -> None:
    options = {"stream_options": {"include_usage": True}} if wanted else {}
    for call in (chat, complete):
        events = ask(call(stream=True, extra_body={"ignore_eos": True}, **options))
        used = [event.usage.completion_tokens for event in events if event.usage]
        assert used == ([8] if wanted else [])
        assert sum(bool(event.choices) for event in events) > 1, "it came in one piece"


def test_the_stream_and_the_whole_answer_are_the_same_text(ask: Ask) -> None:
    whole = ask(complete(max_tokens=20)).choices[0].text
    events = ask(complete(max_tokens=20, stream=True))
    assert "".join(event.choices[0].text for event in events if event.choices) == whole


def test_n_choices_come_and_a_seed_brings_the_same_again(ask: Ask) -> None:
    def texts(**changes: Any) -> list[str]:
        choices = ask(complete(n=3, temperature=1.0, **changes)).choices
        return [choice.text for choice in choices]

    first = texts(seed=7)
    assert len(set(first)) > 1, "three draws were the same"
    assert texts(seed=7) == first
    assert texts(seed=8) != first


def test_a_stop_ends_the_answer_before_it(ask: Ask) -> None:
    asked = {"max_tokens": 60, "extra_body": {"structured_outputs": {"choice": ["a--b"]}}}
    assert ask(complete(**asked)).choices[0].text == "a--b"
    stopped = ask(complete(stop=["--"], **asked)).choices[0]
    assert (stopped.text, stopped.finish_reason) == ("a", "stop")


def test_logprobs_come_with_their_alternatives(ask: Ask) -> None:
    told = ask(chat(logprobs=True, top_logprobs=3, max_tokens=2)).choices[0].logprobs.content
    assert all(len(token.top_logprobs) == 3 for token in told)
    assert all(token.logprob <= 0 for token in told)
    ids = {"return_tokens_as_token_ids": True}  # an untrained model's tokens are seldom text
    told = ask(complete(logprobs=2, max_tokens=2, extra_body=ids)).choices[0].logprobs
    assert all(len(each) >= 2 for each in told.top_logprobs)


@pytest.mark.parametrize("choice", ["required", "named"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_is_called_with_arguments_of_its_schema(
    ask: Ask, choice: str, stream: bool
) -> None:
    named = {"type": "function", "function": {"name": "get_weather"}}
    wanted = named if choice == "named" else choice
    answer = ask(chat(tools=[TOOL], tool_choice=wanted, max_tokens=100, stream=stream))
    if stream:
        deltas = [e.choices[0].delta for e in answer if e.choices]
        parts = [call.function for delta in deltas for call in delta.tool_calls or ()]
        name = "".join(part.name or "" for part in parts)
        arguments = "".join(part.arguments or "" for part in parts)
    else:
        (call,) = answer.choices[0].message.tool_calls
        name, arguments = call.function.name, call.function.arguments
    assert name == "get_weather"
    assert json.loads(arguments) in ({"unit": "C"}, {"unit": "F"})


def test_tools_that_may_be_left_alone_are_left_alone(ask: Ask) -> None:
    for choice in ("auto", "none"):
        message = ask(chat(tools=[TOOL], tool_choice=choice)).choices[0].message
        assert not message.tool_calls


def test_an_answer_has_the_form_that_is_asked_for(ask: Ask) -> None:
    parsed = ask(
        lambda client: client.chat.completions.parse(
            model="tiny", messages=SAID, response_format=Answer, max_tokens=60, temperature=0
        )
    )
    assert isinstance(parsed.choices[0].message.parsed, Answer)
    plain = ask(chat(response_format={"type": "json_object"}, max_tokens=40))
    assert plain.choices[0].message.content.startswith("{")  # cut at 40 tokens


@pytest.mark.parametrize(
    ("form", "texts"),
    [
        ({"choice": ["left", "right"]}, {"left", "right"}),
        ({"regex": "[ab]{2}"}, {"aa", "ab", "ba", "bb"}),
        ({"grammar": 'root ::= "x" | "y"'}, {"x", "y"}),
    ],
)
def test_vllms_other_forms_hold_as_well(ask: Ask, form: dict[str, Any], texts: set[str]) -> None:
    answer = ask(chat(extra_body={"structured_outputs": form}, max_tokens=40))
    assert answer.choices[0].message.content in texts


# --- errors ----------------------------------------------------------------------------------


def test_an_unknown_key_is_refused(known: Site) -> None:
    with pytest.raises(openai.AuthenticationError, match="this API key is not known"):
        known.openai("manta_nobody").models.list()


def test_an_unknown_model_is_not_found(ask: Ask) -> None:
    for call in (chat, complete):
        with pytest.raises(openai.NotFoundError, match="The model `other` does not exist") as said:
            ask(call(model="other"))
        assert said.value.param == "model"
    with pytest.raises(openai.NotFoundError, match="The model `other` does not exist"):
        ask(lambda client: client.models.retrieve("other"))


def test_a_prompt_beyond_the_context_is_a_bad_request(ask: Ask) -> None:
    with pytest.raises(openai.BadRequestError, match="maximum context length is 256"):
        ask(complete(prompt="a b " * 300))


@pytest.mark.parametrize(
    "call",
    [
        lambda client: client.embeddings.create(model="tiny", input="a"),
        lambda client: client.post("/score", cast_to=object, body={"model": "tiny"}),
        lambda client: client.post("/rerank", cast_to=object, body={"model": "tiny"}),
        lambda client: client.audio.transcriptions.create(model="tiny", file=b"x"),
    ],
    ids=["embeddings", "score", "rerank", "audio"],
)
def test_what_a_language_model_cannot_do_is_said_in_openais_words(
    ask: Ask, call: Callable[[Any], Any]
) -> None:
    with pytest.raises(openai.NotFoundError, match="served here cannot answer /v1/") as said:
        ask(call)
    assert said.value.code == "not_served"


def test_a_picture_for_a_model_without_eyes_is_a_bad_request(ask: Ask) -> None:
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    with pytest.raises(openai.BadRequestError, match="not a multimodal model"):
        ask(chat(messages=[{"role": "user", "content": [part]}]))


def test_a_body_that_is_no_json_is_a_bad_request(known: Site) -> None:
    with known.http(known.user) as client:
        headers = {"Content-Type": "application/json"}
        answer = client.post("/v1/chat/completions", content=b"{", headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_json"


def test_every_error_is_in_openais_words(known: Site) -> None:
    with known.http(known.admin) as client:
        answers = [
            client.get("/v1/no-such-route"),
            client.get("/v1/completions"),
            client.post("/v1/completions", json={"model": "tiny"}),
            client.post("/v1/chat/completions", json={"model": "tiny", "messages": "a"}),
            client.post("/v1/responses/none/cancel", json={}),
        ]
    for answer in answers:
        assert 400 <= answer.status_code < 500
        assert isinstance(answer.json()["error"]["message"], str), answer.text


# --- plain HTTP ------------------------------------------------------------------------------


def test_fields_that_gateways_add_and_nulls_do_no_harm(known: Site) -> None:
    """What LiteLLM passes on: OpenAI's newer fields, vLLM's own, and those that are not set."""
    nulls = "stop n tools tool_choice response_format stream logit_bias seed top_p functions"
    asked = {
        "model": "tiny",
        "messages": SAID,
        "max_completion_tokens": 4,
        "user": "someone",
        "metadata": {"trace": "1"},
        "store": False,
        "service_tier": "auto",
        "parallel_tool_calls": None,
        "reasoning_effort": None,
        "top_k": 5,
        "unheard_of": {"a": 1},
        **dict.fromkeys(nulls.split()),
    }
    with known.http(known.user) as client:
        answer = client.post("/v1/chat/completions", json=asked)
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["message"]["role"] == "assistant"
        lines = client.post("/v1/chat/completions", json={**asked, "stream": True}).text
    events = [line.removeprefix("data: ") for line in lines.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    assert all(json.loads(event)["choices"] for event in events[:-1]), "its use is not asked for"


def test_text_becomes_tokens_and_text_again(known: Site) -> None:
    with known.http(known.user) as client:
        asked = {"model": "tiny", "prompt": "def main("}
        tokens = client.post("/tokenize", json=asked).json()["tokens"]
        again = client.post("/detokenize", json={"model": "tiny", "tokens": tokens}).json()
        said = client.post("/tokenize", json={"model": "tiny", "messages": SAID}).json()
    assert again["prompt"] == "def main("
    assert said["count"] > 0


def test_serves_own_header_for_adapters_changes_nothing(known: Site) -> None:
    """Ray would look for that adapter, and answer 500 where there is none."""
    headers = {"serve_multiplexed_model_id": "tiny:nobody"}
    asked = {"model": "tiny", "prompt": "a", "max_tokens": 1}
    with known.http(known.user) as client:
        assert client.post("/v1/completions", json=asked, headers=headers).status_code == 200


# --- LangChain -------------------------------------------------------------------------------


@pytest.fixture
def chain(known: Site) -> ChatOpenAI:
    return ChatOpenAI(
        model="tiny",
        base_url=f"{known.url}/v1",
        api_key=SecretStr(known.user),
        max_retries=0,
        temperature=0,
        max_completion_tokens=60,
    )


def test_langchain_asks_and_streams(chain: ChatOpenAI) -> None:
    whole = chain.invoke("def main(")
    assert whole.usage_metadata is not None
    pieces = list(chain.stream("def main("))
    assert len(pieces) > 1
    assert "".join(str(piece.content) for piece in pieces) == whole.content
    assert asyncio.run(chain.ainvoke("def main(")).content == whole.content


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_langchain_gets_structured_output(
    chain: ChatOpenAI, method: Literal["json_schema", "function_calling"]
) -> None:
    answer = chain.with_structured_output(Answer, method=method).invoke("def main(")
    assert isinstance(answer, Answer)


def test_langchain_binds_tools(chain: ChatOpenAI) -> None:
    bound = chain.bind_tools([TOOL], tool_choice="required")
    (call,) = bound.invoke("def main(").tool_calls
    assert call["name"] == "get_weather"
    assert call["args"]["unit"] in ("C", "F")


@pytest.mark.parametrize(("prefix", "model"), [("/embeddings", "ngrams"), ("/reader", "reader")])
def test_langchain_embeds(known: Site, prefix: str, model: str) -> None:
    embedder = OpenAIEmbeddings(
        model=model,
        base_url=f"{known.url}{prefix}/v1",
        api_key=SecretStr(known.user),
        max_retries=0,
        check_embedding_ctx_length=False,  # it would send token ids of OpenAI's models otherwise
    )
    one, other = embedder.embed_documents(["a word", "another"])
    assert len(one) == len(other) >= 64
    assert embedder.embed_query("a word") == pytest.approx(one, abs=1e-5)


# --- a model that embeds ---------------------------------------------------------------------


def test_vllm_embeds_scores_and_ranks_behind_the_same_guard(known: Site) -> None:
    client = known.openai(prefix="/reader")
    texts = ["def main(argument):", "import os", "def main(argument):"]
    first, other, again = (
        entry.embedding for entry in client.embeddings.create(model="reader", input=texts).data
    )
    assert first == pytest.approx(again, abs=1e-4)
    assert dot(first, other) < 0.999
    with known.http(known.user, "/reader") as http:
        asked = {"model": "reader", "text_1": texts[0], "text_2": texts[1:]}
        scores = [one["score"] for one in http.post("/v1/score", json=asked).json()["data"]]
        assert scores[1] == pytest.approx(1, abs=1e-3)
        assert scores[0] == pytest.approx(dot(first, other), abs=1e-2)
        query = {"model": "reader", "query": texts[0], "documents": texts[1:]}
        for route in ("/v1/rerank", "/v2/rerank", "/rerank"):
            ranked = http.post(route, json=query).json()["results"]
            assert [one["index"] for one in ranked] == [1, 0]
        pooled = http.post("/pooling", json={"model": "reader", "input": "a"})
        assert pooled.status_code == 200
    with pytest.raises(openai.NotFoundError, match="cannot answer /v1/chat/completions"):
        client.chat.completions.create(model="reader", messages=SAID)
    with pytest.raises(openai.AuthenticationError):
        known.openai("manta_nobody", "/reader").embeddings.create(model="reader", input="a")


def dot(left: list[float], right: list[float]) -> float:
    return sum(a * b for a, b in zip(left, right, strict=True))


def test_httpx_is_enough(known: Site) -> None:
    answer = httpx.post(
        f"{known.url}/v1/completions",
        json={"prompt": "a", "max_tokens": 1},  # no model: there is but one
        headers={"Authorization": f"Bearer {known.user}"},
        timeout=60,
    )
    assert answer.status_code == 200
