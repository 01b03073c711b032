"""Adapters of a replica: which there are, what is copied, who makes room for whom."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from manta import storage
from manta.errors import InputError
from manta.serving.access.usage import Ledger
from manta.serving.engine import adapters as module
from manta.serving.engine.adapters import CONFIG, WEIGHTS, Adapter, Adapters
from manta.serving.openai_errors import Refused
from manta.spec.adapters import AdaptersConfig
from manta.spec.guard import Price


class Engine:
    """Stands for vLLM: notes what it holds, and reads the files as they are when it loads."""

    def __init__(self) -> None:
        self.held: dict[str, bytes] = {}
        self.num_loads = 0
        self.error: Exception | None = None

    async def load(self, adapter: Adapter) -> None:
        self.num_loads += 1
        await asyncio.sleep(0)
        if self.error:
            raise self.error
        assert sorted(file.name for file in adapter.folder.iterdir()) == [CONFIG, WEIGHTS]
        self.held[adapter.label] = (adapter.folder / WEIGHTS).read_bytes()

    async def unload(self, adapter: Adapter) -> None:
        del self.held[adapter.label]


class Shelf:
    """A folder of adapters, and what a replica makes of it."""

    def __init__(self, root: Path, **changes: Any) -> None:
        self.root = root
        self.engine = Engine()
        config = AdaptersConfig(**changes)
        self.adapters = Adapters("base", str(root), config, self.engine)

    def put(self, name: str, weights: bytes = b"w", **further: bytes) -> Path:
        folder = self.root / "adapters" / name
        folder.mkdir(parents=True, exist_ok=True)
        for file, content in {CONFIG: b"{}", WEIGHTS: weights, **further}.items():
            (folder / file).write_bytes(content)
            os.utime(folder / file, ns=(0, hash(content) % 10**15))
        return folder

    async def use(self, model: str) -> bytes:
        async with self.adapters.using(model) as adapter:
            return self.engine.held[adapter.label]


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path, max_num_adapters_per_replica=2)


@pytest.fixture(autouse=True)
def look_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_S", 0.0)


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(work)


def test_what_lies_whole_in_the_folder_is_a_model(shelf: Shelf) -> None:
    shelf.put("b")
    shelf.put("a")
    (shelf.put("half") / WEIGHTS).unlink()
    shelf.put("not a name")
    (shelf.root / "adapters" / CONFIG).write_bytes(b"{}")
    assert run(shelf.adapters.models()) == ["base:a", "base:b"]


def test_without_the_folder_there_are_none(shelf: Shelf) -> None:
    assert run(shelf.adapters.models()) == []


@pytest.mark.parametrize("name", ["base:b", "base:../adapters/a", "base:", "base:a/", "base:."])
def test_what_is_not_there_is_not_found(shelf: Shelf, name: str) -> None:
    shelf.put("a")
    with pytest.raises(Refused) as refusal:
        run(shelf.use(name))
    assert refusal.value.status == 404
    assert shelf.engine.num_loads == 0


def test_many_who_ask_at_once_load_it_once(shelf: Shelf) -> None:
    shelf.put("a", b"weights")

    async def ask() -> list[bytes]:
        return list(await asyncio.gather(*(shelf.use("base:a") for _ in range(20))))

    assert set(run(ask())) == {b"weights"}
    assert shelf.engine.num_loads == 1


def test_one_who_leaves_does_not_stop_the_loading_for_others(shelf: Shelf) -> None:
    shelf.put("a")

    async def leave() -> bytes:
        first = asyncio.create_task(shelf.use("base:a"))
        second = asyncio.create_task(shelf.use("base:a"))
        await asyncio.sleep(0)
        first.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await first
        return await second

    assert run(leave()) == b"w"
    assert shelf.engine.num_loads == 1


def test_the_least_recently_used_makes_room_and_its_copy_goes(shelf: Shelf) -> None:
    for name in "abc":
        shelf.put(name)

    async def ask() -> None:
        for name in "abac":
            await shelf.use(f"base:{name}")

    run(ask())
    assert {label[0] for label in shelf.engine.held} == {"a", "c"}
    copies = Path(shelf.adapters._place.name).iterdir()
    assert {copy.name[0] for copy in copies} == {"a", "c"}


def test_what_is_in_use_makes_no_room_and_who_finds_none_is_told_to_wait(shelf: Shelf) -> None:
    for name in "abc":
        shelf.put(name)

    async def ask() -> None:
        using = shelf.adapters.using
        async with using("base:a"), using("base:b"):
            with pytest.raises(Refused) as refusal:
                await shelf.use("base:c")
            assert refusal.value.status == 503
            assert refusal.value.retry_after_s
        assert await shelf.use("base:c") == b"w"

    run(ask())


def test_more_than_fit_at_once_each_get_their_own_in_the_end(shelf: Shelf) -> None:
    names = "abcdef"
    for name in names:
        shelf.put(name, name.encode())

    async def patient(name: str) -> bytes:
        while True:
            try:
                return await shelf.use(f"base:{name}")
            except Refused as refusal:
                if refusal.status != 503:
                    raise
                await asyncio.sleep(0.01)

    async def ask() -> list[bytes]:
        return list(await asyncio.gather(*(patient(name) for name in names * 5)))

    assert run(ask()) == [name.encode() for name in names * 5]
    assert len(shelf.engine.held) <= 2


def test_new_content_is_another_adapter_and_the_old_one_stays_until_it_is_free(
    shelf: Shelf,
) -> None:
    shelf.put("a", b"old")

    async def ask() -> None:
        async with shelf.adapters.using("base:a") as before:
            shelf.put("a", b"new")
            assert await shelf.use("base:a") == b"new"
            assert shelf.engine.held[before.label] == b"old"
        assert list(shelf.engine.held.values()) == [b"new"]

    run(ask())


def test_only_its_own_two_files_are_copied(shelf: Shelf) -> None:
    shelf.put("a", **{"adapter_model.bin": b"pickle", "training_args.bin": b"pickle"})
    assert run(shelf.use("base:a")) == b"w"  # the engine looks at what there is


def test_a_copy_that_differs_from_its_seal_is_not_loaded(shelf: Shelf) -> None:
    folder = shelf.put("a", b"true")
    storage.seal(str(folder))
    assert run(shelf.use("base:a")) == b"true"
    (folder / WEIGHTS).write_bytes(b"fake")
    with pytest.raises(Refused) as refusal:
        run(shelf.use("base:a"))
    assert refusal.value.status == 503
    assert b"fake" not in shelf.engine.held.values()


def test_what_the_engine_cannot_use_is_not_tried_again_at_once(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOOK_S", 60.0)
    shelf.put("a")
    shelf.engine.error = ValueError("rank 32\nat /secret/path")
    for _ in range(3):
        with pytest.raises(Refused) as refusal:
            run(shelf.use("base:a"))
        assert refusal.value.status == 400
        assert refusal.value.error["message"] == "adapter `a` cannot be loaded: rank 32"
    assert shelf.engine.num_loads == 1


def test_without_the_storage_what_was_known_goes_on(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf.put("a")
    assert run(shelf.use("base:a")) == b"w"

    def away(url: str) -> dict[str, str]:
        raise InputError(f"{url}: cannot be listed")

    monkeypatch.setattr(storage, "file_marks", away)
    assert run(shelf.use("base:a")) == b"w"


def test_an_adapter_costs_what_its_base_costs(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path), {"base": Price(prompt_usd_per_million=2)})
    assert ledger.cost_usd("base:a", 10**6, 0) == 2
