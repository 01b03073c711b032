"""LoRA adapters that lie in S3, loaded by the real engine when somebody asks for them."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable

import boto3
import openai
import pytest
import tiny_model

from .conftest import Site, wait_for_key

pytestmark = pytest.mark.timeout(900)


def upload(name: str, files: dict[str, bytes]) -> None:
    for file, content in files.items():
        boto3.client("s3").put_object(Bucket="manta", Key=f"adapters/{name}/{file}", Body=content)


@functools.cache
def shelf() -> dict[str, dict[str, bytes]]:
    """All adapters: name → files."""
    good = tiny_model.adapter(1)
    return {
        "one": good,
        "two": tiny_model.adapter(2),
        "three": tiny_model.adapter(3),
        "changing": good,
        "bad-rank": tiny_model.adapter(1, rank=32),
        "bad-shape": tiny_model.adapter(1, size=512),
        "bad-weights": {**good, "adapter_model.safetensors": b"cut"},
        "bad-config": {**good, "adapter_config.json": b"[]"},
    }


@pytest.fixture(scope="module")
def adapters(known: Site) -> openai.OpenAI:
    """A client, once all of them are in the list."""
    for name, files in shelf().items():
        upload(name, files)
    client = known.openai()
    poll("adapters in the list", lambda: {f"tiny:{name}" for name in shelf()} < set(names(client)))
    return client


def names(client: openai.OpenAI) -> list[str]:
    return [model.id for model in client.models.list().data]


def answer(client: openai.OpenAI, model: str) -> str:
    done = client.completions.create(
        model=model,
        prompt="def main(",
        max_tokens=12,
        temperature=0,
        logprobs=1,
        extra_body={"ignore_eos": True, "return_tokens_as_token_ids": True},
    )
    told = done.choices[0].logprobs
    assert told is not None
    return json.dumps(told.tokens)


def poll(what: str, ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 15
    while not ready():
        assert time.monotonic() < deadline, f"no {what}"
        time.sleep(0.2)


def test_adapters_are_models_of_their_own_more_of_them_than_fit(adapters: openai.OpenAI) -> None:
    assert names(adapters) == ["tiny", *(f"tiny:{name}" for name in sorted(shelf()))]
    assert adapters.models.retrieve("tiny:one").id == "tiny:one"
    models = ("tiny", "tiny:one", "tiny:two", "tiny:three")
    first = {model: answer(adapters, model) for model in models}
    assert len(set(first.values())) == len(models), "an adapter answered as another model does"
    # Two places: each of these had to be loaded anew.
    assert {model: answer(adapters, model) for model in models} == first
    stream = adapters.completions.create(
        model="tiny:two", prompt="def main(", max_tokens=12, stream=True, temperature=0
    )
    assert {event.model.partition("@")[0] for event in stream} == {"tiny:two"}


def test_an_adapter_that_is_replaced_answers_as_its_new_self(adapters: openai.OpenAI) -> None:
    before = answer(adapters, "tiny:changing")
    assert before == answer(adapters, "tiny:one"), "the same weights"
    upload("changing", shelf()["two"])
    poll("new answer", lambda: answer(adapters, "tiny:changing") != before)
    assert answer(adapters, "tiny:changing") == answer(adapters, "tiny:two")


def test_an_adapter_that_is_not_there_is_not_found(adapters: openai.OpenAI) -> None:
    for name in ("tiny:nobody", "tiny:../adapters/one", "tiny:", "one"):
        with pytest.raises(openai.NotFoundError, match="does not exist") as said:
            answer(adapters, name)
        assert said.value.param == "model"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("bad-rank", "LoRA rank 32 is greater than max_lora_rank 16"),
        ("bad-shape", "The size of tensor"),
        ("bad-weights", "cannot be loaded: "),
        ("bad-config", "cannot be loaded: "),
    ],
)
def test_an_adapter_that_the_engine_cannot_use_is_a_bad_request_and_no_more(
    adapters: openai.OpenAI, name: str, reason: str
) -> None:
    before = answer(adapters, "tiny:one")
    for _ in range(2):
        with pytest.raises(openai.BadRequestError, match=reason) as said:
            answer(adapters, f"tiny:{name}")
        assert said.value.code == "adapter_unusable"
    assert answer(adapters, "tiny:one") == before


def test_a_keys_models_cover_adapters_by_name(known: Site, adapters: openai.OpenAI) -> None:
    secret = known.key(models=("tiny:one",))
    wait_for_key(known, secret)
    client = known.openai(secret)
    assert answer(client, "tiny:one") == answer(adapters, "tiny:one")
    for other in ("tiny", "tiny:two"):
        with pytest.raises(openai.PermissionDeniedError, match="not for model"):
            answer(client, other)
