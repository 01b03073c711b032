"""Registered models: versions that stay, aliases that move, and what a deploy makes of them."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from manta import storage
from manta.cli.main import cli
from manta.errors import InputError
from manta.serving import registry
from manta.serving.access.owner import BUILDER
from manta.serving.apps import models
from manta.serving.apps.config import ServeConfig
from manta.workloads import layout


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MANTA_STORAGE", str(tmp_path / "storage"))
    return str(tmp_path / "storage")


def train(root: str, content: bytes, name: str = "m") -> str:
    """What a training leaves, in place of what was there."""
    folder = Path(root).parent / "made"
    folder.mkdir(exist_ok=True)
    (folder / "weights").write_bytes(content)
    storage.upload(folder, layout.model(name, root), {"kind": "model"})
    return layout.model(name, root)


def add(root: str, content: bytes) -> registry.Version:
    return registry.add(root, "m", train(root, content), "me")


def test_versions_are_numbered_and_stay_when_the_model_is_trained_again(root: str) -> None:
    assert [add(root, b"1").reference, add(root, b"2").reference] == ["m@1", "m@2"]
    train(root, b"3")
    for number in (1, 2):
        url = layout.model(f"m@{number}", root)
        seal = storage.verify(url, "it")
        assert storage.read_bytes(storage.join(url, "weights")) == str(number).encode()
        assert seal["kind"] == "model"


def test_the_same_content_is_registered_once(root: str) -> None:
    first = add(root, b"1")
    assert add(root, b"1") == first
    add(root, b"2")
    assert add(root, b"1").number == 3, "it is not the newest any more"


def test_several_who_register_at_once_get_different_numbers(root: str) -> None:
    def claim(number: int) -> int:
        return registry._claim(root, "m", str(number), "me")

    with ThreadPoolExecutor(8) as pool:
        numbers = list(pool.map(claim, range(16)))
    assert sorted(numbers) == list(range(1, 17))


def test_what_was_not_finished_is_no_version(root: str) -> None:
    add(root, b"1")
    registry._claim(root, "m", "x", "me")
    assert [one.number for one in registry.versions(root, "m")] == [1]
    assert add(root, b"2").number == 3


def test_an_alias_moves_and_is_shown(root: str) -> None:
    add(root, b"1"), add(root, b"2")
    registry.promote(root, "m@1", "production", "me")
    assert layout.model("m@production", root) == layout.model("m@1", root)
    registry.promote(root, "m@2", "production", "me")
    assert layout.model("m@production", root) == layout.model("m@2", root)
    assert [one.aliases for one in registry.versions(root, "m")] == [(), ("production",)]


@pytest.mark.parametrize(
    ("reference", "alias"),
    [("m@9", "production"), ("m", "production"), ("m@staging", "production"), ("m@1", "../x"),
     ("m@1", "7"), ("../m@1", "production"), ("nobody@1", "production")],
)  # fmt: skip
def test_what_is_not_there_cannot_be_promoted(root: str, reference: str, alias: str) -> None:
    add(root, b"1")
    with pytest.raises(InputError):
        registry.promote(root, reference, alias, "me")


@pytest.mark.parametrize("name", ["m@production", "m@2", "m@", "@1", "m@..", "m@1@1"])
def test_a_name_that_means_nothing_is_one_line(root: str, name: str) -> None:
    add(root, b"1")
    with pytest.raises(InputError):
        models.verify(app(name), root)


def app(source: str) -> dict[str, Any]:
    loading = {"model_id": "served", "model_source": source}
    return {
        "name": "llm",
        "import_path": BUILDER,
        "args": {"llm_configs": [{"model_loading_config": loading}]},
    }


def pinned(source: str, root: str) -> dict[str, Any]:
    wanted = ServeConfig(applications_passthrough=(app(source),), file="x", options_passthrough={})
    (made,) = models.pin_models(wanted, root).applications_passthrough
    return dict(made)


def test_a_deploy_names_the_version_that_an_alias_means_now(root: str) -> None:
    add(root, b"1"), add(root, b"2")
    registry.promote(root, "m@1", "production", "me")
    made = pinned("m@production", root)
    assert models.sources(made) == ["m@1"]
    assert models.gone(made, root) == ()
    registry.promote(root, "m@2", "production", "me")
    train(root, b"3")
    assert models.gone(made, root) == (), "a rollback would find it as it was"
    assert models.sources(pinned("m@production", root)) == ["m@2"]
    assert pinned("m@1", root)["args"] == app("m@1")["args"]


def test_a_damaged_version_is_refused_before_a_deploy(root: str) -> None:
    add(root, b"1")
    Path(layout.model("m@1", root), "weights").write_bytes(b"x")
    with pytest.raises(InputError, match="is damaged"):
        models.verify(app("m@1"), root)


def test_the_command_registers_promotes_and_lists(root: str) -> None:
    def manta(*words: str) -> Any:
        done = CliRunner().invoke(cli, ["models", *words, "--json"], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    train(root, b"1")
    (made,) = manta("add", "m", "--as", "production")
    assert (made["model"], made["aliases"]) == ("m@1", ["production"])
    other = train(root, b"2", "other")
    assert manta("add", "m", "--from", other)[0]["model"] == "m@2"
    assert manta("promote", "m@2", "production")[0]["aliases"] == ["production"]
    assert [one["aliases"] for one in manta("list")] == [[], ["production"]]
    assert manta("list", "nobody") == []
