"""Models of the Hugging Face Hub, asked for with its own client from a Hub of the test's."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hub_server
import pytest

from manta.errors import InputError, MantaError
from manta.serving.apps.config import ServeConfig
from manta.serving.apps.models import pin_models

MODEL = "acme/quick"
CONFIG = {"config.json": b"{}"}


@pytest.fixture
def hub() -> Iterator[hub_server.Hub]:
    with hub_server.running() as made:
        yield made


def app(
    tmp_path: Path, source: str, variables: dict[str, str], engine: dict[str, Any] | None = None
) -> ServeConfig:
    """A Serve config with one LLM, as a user writes it."""
    llm = {
        "model_loading_config": {"model_id": "quick", "model_source": source},
        "runtime_env": {"env_vars": variables},
        "engine_kwargs": engine or {},
    }
    entry = {
        "name": "llm",
        "import_path": "manta.serving.llm:build_openai_app",
        "args": {"llm_configs": [llm]},
    }
    return ServeConfig(
        file=str(tmp_path / "x.yaml"), applications_passthrough=(entry,), options_passthrough={}
    )


def revision(pinned: ServeConfig) -> str | None:
    (one,) = pinned.applications_passthrough
    return one["args"]["llm_configs"][0]["engine_kwargs"].get("revision")  # type: ignore[no-any-return]


def test_a_deploy_notes_the_commit_that_the_branch_has_now(
    hub: hub_server.Hub, tmp_path: Path
) -> None:
    first = hub.push(MODEL, CONFIG)
    asked = app(tmp_path, MODEL, {"HF_ENDPOINT": hub.url})
    pinned = pin_models(asked, str(tmp_path))
    assert revision(pinned) == first
    second = hub.push(MODEL, {"config.json": b"{ }"})
    assert revision(pin_models(asked, str(tmp_path))) == second != first
    # What was deployed, and what a rollback deploys, stays at its commit and asks nobody.
    hub.asked.clear()
    assert revision(pin_models(pinned, str(tmp_path))) == first
    assert hub.asked == []


def test_a_branch_or_tag_of_the_config_is_followed(hub: hub_server.Hub, tmp_path: Path) -> None:
    hub.push(MODEL, CONFIG)
    tagged = hub.push(MODEL, {"config.json": b"{ }"}, "v2")
    asked = app(tmp_path, MODEL, {"HF_ENDPOINT": hub.url}, {"revision": "v2"})
    pinned = pin_models(asked, str(tmp_path))
    assert revision(pinned) == tagged
    # The replicas of a local cluster ask nobody unless they are told to.
    (one,) = pinned.applications_passthrough
    assert one["args"]["llm_configs"][0]["runtime_env"]["env_vars"]["HF_HUB_OFFLINE"] == "0"


@pytest.mark.parametrize(
    ("source", "engine", "says"),
    [
        ("acme/slow", {}, "model `acme/slow`: http://.* has no such model"),
        (MODEL, {"revision": "v9"}, f"model `{MODEL}`, revision `v9`: the Hub has no such"),
        ("acme/quick/more", {}, "not a name as the Hub has them"),
        ("acme/secret", {}, "has no such model; .*HF_TOKEN"),
    ],
)
def test_what_the_hub_does_not_have_is_one_line_before_anything_is_sent(
    hub: hub_server.Hub, tmp_path: Path, source: str, engine: dict[str, Any], says: str
) -> None:
    hub.push(MODEL, CONFIG)
    hub.push("acme/secret", CONFIG)
    hub.private["acme/secret"] = "hf_x"
    asked = app(tmp_path, source, {"HF_ENDPOINT": hub.url}, engine)
    with pytest.raises(InputError, match=says) as told:
        pin_models(asked, str(tmp_path))
    assert "\n" not in str(told.value)


def test_a_private_model_opens_to_the_token_of_the_replicas(
    hub: hub_server.Hub, tmp_path: Path
) -> None:
    commit = hub.push("acme/secret", CONFIG)
    hub.private["acme/secret"] = "hf_x"
    asked = app(tmp_path, "acme/secret", {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_x"})
    assert revision(pin_models(asked, str(tmp_path))) == commit


def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path: Path) -> None:
    with hub_server.running() as gone:
        url = gone.url
    with pytest.raises(MantaError, match=r"cannot be asked .*HF_HUB_OFFLINE") as told:
        pin_models(app(tmp_path, MODEL, {"HF_ENDPOINT": url}), str(tmp_path))
    assert not isinstance(told.value, InputError)
    assert "\n" not in str(told.value)


def test_replicas_that_use_their_caches_ask_nobody(tmp_path: Path) -> None:
    asked = app(tmp_path, MODEL, {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"})
    assert revision(pin_models(asked, str(tmp_path))) is None


def test_a_config_with_a_hub_id_is_checked_and_planned_without_the_hub(tmp_path: Path) -> None:
    file = tmp_path / "app.yaml"
    file.write_text(
        "applications:\n"
        "  - name: llm\n"
        "    route_prefix: /\n"
        "    import_path: manta.serving.llm:build_openai_app\n"
        "    args:\n"
        "      guard: {max_media: 4, media_tokens: 500}\n"
        "      llm_configs:\n"
        "        - model_loading_config: {model_id: quick, model_source: acme/quick}\n"
        "          runtime_env: {env_vars: {HF_ENDPOINT: 'http://127.0.0.1:9'}}\n"
        "          engine_kwargs: {revision: v2, max_model_len: 1024}\n"
    )
    assert "no errors" in manta("check", str(file))
    assert "no facts about `acme/quick` here; give its config.json" in manta("plan", str(file))


def manta(*words: str) -> str:
    command = [str(Path(sys.executable).with_name("manta")), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr
