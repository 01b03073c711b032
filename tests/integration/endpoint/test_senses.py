"""Models that see and hear: one from a Hugging Face Hub of the test's, one from S3."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import hub_server
import openai
import pytest
import tiny_senses
import yaml

from manta.serving.access import usage

from .conftest import Site, language_model, wait_for_key

pytestmark = pytest.mark.timeout(900)

NAME = "acme/eyes"
RED, GREEN = (200, 30, 30), (30, 200, 30)


@pytest.fixture(scope="module")
def hub() -> Iterator[hub_server.Hub]:
    with hub_server.running() as made:
        yield made


def serving(name: str, source: str, variables: dict[str, str], **engine: Any) -> dict[str, Any]:
    app = language_model()
    (llm,) = app["args"]["llm_configs"]
    del llm["lora_config"]
    llm["model_loading_config"] = {"model_id": name, "model_source": source}
    llm["engine_kwargs"] = {"enforce_eager": True, **engine}
    llm["runtime_env"]["env_vars"] |= variables
    app["args"]["guard"]["max_body_bytes"] = 2**20
    return {**app, "name": name, "route_prefix": f"/{name}"}


@pytest.fixture(scope="module")
def senses(
    known: Site, hub: hub_server.Hub, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    """The site with a model that sees at /eyes and one that hears at /ears."""
    folder = tmp_path_factory.mktemp("senses")
    eyes = tiny_senses.write_eyes(str(folder), "eyes")
    hub.push(NAME, {file.name: file.read_bytes() for file in Path(eyes).iterdir()})
    tiny_senses.write_ears("s3://manta", "ears")
    at_hub = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "hf")}
    apps = [
        serving(
            "eyes",
            NAME,
            at_hub,
            max_model_len=128,
            dtype="float32",
            allowed_media_domains=["localhost"],
        ),
        serving("ears", "s3://manta/models/ears", {}),
    ]
    (folder / "senses.yaml").write_text(yaml.safe_dump({"applications": apps}))
    known.manta("deploy", str(folder / "senses.yaml"))
    try:
        for prefix in ("/eyes", "/ears"):
            wait_for_key(known, known.user, prefix)
        yield known
    finally:
        known.manta("undeploy", "eyes")
        known.manta("undeploy", "ears")


def data_url(color: tuple[int, int, int]) -> str:
    return "data:image/png;base64," + base64.b64encode(tiny_senses.picture(color)).decode()


def look(url: str, **parameters: Any) -> dict[str, Any]:
    content = [{"type": "text", "text": "what"}, {"type": "image_url", "image_url": {"url": url}}]
    said = [{"role": "user", "content": content}]
    return {"model": "eyes", "messages": said, "max_tokens": 2, "temperature": 0, **parameters}


def ask(site: Site, body: dict[str, Any], prefix: str = "/eyes") -> httpx.Response:
    with site.http(site.user, prefix) as client:
        return client.post("/v1/chat/completions", json=body)


# --- eyes ------------------------------------------------------------------------------------


def test_a_model_of_the_hub_is_fetched_at_the_commit_that_the_deploy_noted(
    senses: Site, hub: hub_server.Hub
) -> None:
    commit = hub.branches[NAME, "main"]
    weights = [path for path in hub.asked if path.endswith("/model.safetensors")]
    assert set(weights) == {f"/{NAME}/resolve/{commit}/model.safetensors"}


def test_answers_follow_from_the_picture(senses: Site) -> None:
    answers = [
        ask(senses, look(data_url(color), logprobs=True, top_logprobs=3)).json()
        for color in (RED, GREEN, RED)
    ]
    first, other, again = (
        [round(t["logprob"], 4) for t in a["choices"][0]["logprobs"]["content"]] for a in answers
    )
    assert first == again != other
    assert answers[0]["usage"]["prompt_tokens"] > tiny_senses.NUM_IMAGE_TOKENS


def test_openais_client_shows_pictures_in_streams_too(senses: Site) -> None:
    client = senses.openai(prefix="/eyes")
    events = list(client.chat.completions.create(**look(data_url(RED)), stream=True))
    assert events[-1].choices[0].finish_reason is not None


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:{port}/picture.png",
        "http://169.254.169.254/latest/meta-data/",
        "http://[::1]:{port}/picture.png",
        "http://localhost.:{port}/picture.png",
        "http://localhost@127.0.0.1:{port}/picture.png",
    ],
)
def test_engines_fetch_from_no_host_that_is_not_named(
    senses: Site, hub: hub_server.Hub, url: str
) -> None:
    hub.asked.clear()
    answer = ask(senses, look(url.format(port=urlsplit(hub.url).port)))
    assert answer.status_code == 400, answer.text
    assert "allowed" in answer.json()["error"]["message"]
    assert hub.asked == []


def test_engines_fetch_from_hosts_that_are_named_and_are_not_sent_on(
    senses: Site, hub: hub_server.Hub
) -> None:
    site = hub.url.replace("127.0.0.1", "localhost")
    hub.pages["/red.png"] = (200, tiny_senses.picture(RED), {})
    hub.pages["/on.png"] = (302, b"", {"Location": f"{hub.url}/red.png"})
    assert ask(senses, look(f"{site}/red.png")).status_code == 200
    hub.asked.clear()
    answer = ask(senses, look(f"{site}/on.png"))
    assert 400 <= answer.status_code < 500, answer.text
    assert hub.asked == ["/on.png"]


@pytest.mark.parametrize(
    "url",
    ["file:///etc/passwd", "ftp://a/b", "", "a", "data:image/png;base64,AAAA", "data:image/png,A"],
)
def test_what_is_no_picture_is_a_bad_request(senses: Site, url: str) -> None:
    answer = ask(senses, look(url))
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"]


def test_more_pictures_than_the_model_takes_are_a_bad_request(senses: Site) -> None:
    body = look(data_url(RED))
    body["messages"][0]["content"] *= 2
    assert ask(senses, body).status_code == 400
    body["messages"][0]["content"] *= 10
    answer = ask(senses, body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages")


# --- ears ------------------------------------------------------------------------------------


def hear(client: openai.OpenAI, sound: bytes, **parameters: Any) -> Any:
    given: Any = {"model": "ears", "language": "en", **parameters}
    return client.audio.transcriptions.create(file=("a.wav", sound), **given)


def test_openais_client_has_sounds_transcribed_and_translated(senses: Site) -> None:
    client = senses.openai(prefix="/ears")
    heard = hear(client, tiny_senses.sound(2))
    assert isinstance(heard.text, str)
    assert heard.usage.seconds == 2
    assert hear(client, tiny_senses.sound(), response_format="verbose_json").duration == 1
    assert len(list(hear(client, tiny_senses.sound(), stream=True))) > 0
    sound = ("a.wav", tiny_senses.sound())
    english: Any = {"model": "ears", "extra_body": {"language": "en"}}
    assert isinstance(client.audio.translations.create(file=sound, **english).text, str)


def test_sounds_of_another_rate_are_heard_too(senses: Site) -> None:
    assert hear(senses.openai(prefix="/ears"), tiny_senses.sound(2, 44_100)).usage.seconds == 2


def test_a_key_for_other_models_hears_nothing(senses: Site) -> None:
    theirs, others = senses.key(models=("ears",)), senses.key(models=("eyes",))
    for key in (theirs, others):
        wait_for_key(senses, key, "/ears")
    hear(senses.openai(theirs, "/ears"), tiny_senses.sound())
    with pytest.raises(openai.PermissionDeniedError, match="not for model `ears`"):
        hear(senses.openai(others, "/ears"), tiny_senses.sound())


def test_seconds_count_as_tokens_of_the_key(senses: Site) -> None:
    secret = senses.key()
    wait_for_key(senses, secret, "/ears")
    hear(senses.openai(secret, "/ears"), tiny_senses.sound(3))
    month = datetime.now(UTC).strftime("%Y-%m")
    deadline = time.monotonic() + 20
    while True:
        mine = [use for use in usage.read(senses.storage, month) if use.key_id in secret]
        if mine:
            break
        assert time.monotonic() < deadline, "nothing was counted"
        time.sleep(0.3)
    assert [(use.model, use.prompt_tokens) for use in mine] == [("ears", 150)]


@pytest.mark.parametrize("sound", [b"", b"nonsense", b"RIFF\0\0\0\0WAVEfmt "])
def test_what_is_no_sound_is_a_bad_request(senses: Site, sound: bytes) -> None:
    with pytest.raises(openai.BadRequestError):
        hear(senses.openai(prefix="/ears"), sound)


def test_a_sound_over_the_bound_is_refused_before_it_is_read(senses: Site) -> None:
    with pytest.raises(openai.APIStatusError) as told:
        hear(senses.openai(prefix="/ears"), tiny_senses.sound(40))
    assert told.value.status_code == 413


def test_forms_that_are_read_in_two_ways_are_refused(senses: Site) -> None:
    """A scoped key would name one model to the guard and another to the engine."""
    head = b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\nears\r\n'
    tricks = (
        b"--x\r\nContent-Disposition: form-data; name*=utf-8''model\r\n\r\nother\r\n",
        b'--x\r\nContent-Disposition: form-data; name="a"; name="model"\r\n\r\nother\r\n',
        head,
    )
    with senses.http(senses.user, "/ears") as client:
        for trick in tricks:
            answer = client.post(
                "/v1/audio/transcriptions",
                content=head + trick + b"--x--\r\n",
                headers={"Content-Type": "multipart/form-data; boundary=x"},
            )
            assert answer.status_code == 400, answer.text
            assert json.loads(answer.text)["error"]["code"] in ("invalid_form", "invalid_value")


def test_a_model_that_hears_does_not_chat(senses: Site) -> None:
    said = [{"role": "user", "content": "a"}]
    answer = ask(senses, {"model": "ears", "messages": said}, "/ears")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_served")
