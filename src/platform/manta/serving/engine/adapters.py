"""LoRA adapters of one replica: found in the storage, copied, loaded into the engine, let go.

An adapter is a folder as PEFT writes it, `adapter_config.json` and `adapter_model.safetensors`.
Of a folder with a seal the copy is compared with it. Content that changes under a name is loaded
as another adapter: answers under way go on with the old one, and the engine's prefix cache, which
goes by the adapter's label, never mixes the two.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import re
import shutil
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from manta import storage
from manta.errors import MantaError
from manta.serving.openai_errors import Refused, bad_request, overloaded
from manta.spec.adapters import AdaptersConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""The files that are copied. Others stay: weights of older formats run code when they are read."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_CAUSE = re.compile(r"Worker failed with error '(.*)', please check the stack trace")
LOOK_S = 5.0
"""How long a listing of the folder is believed, and a failure remembered."""

logger = logging.getLogger(__name__)


@dataclass(kw_only=True, eq=False)
class Adapter:
    """One content of one adapter, as the engine has it."""

    name: str
    content: str
    """Changes when the files do."""
    folder: Path
    """Its copy on this machine; the engine reads it again after it pushed it out of memory."""
    number: int = 0
    """The engine's."""
    num_users: int = 0
    """Requests that are being answered with it."""

    @property
    def label(self) -> str:
        """What the engine and its answers call it."""
        return f"{self.name}@{self.content}"


class Engine(Protocol):
    """What loads an adapter."""

    async def load(self, adapter: Adapter) -> None:
        """Make it known under its name, and set its number. Raises if the engine cannot use it."""

    async def unload(self, adapter: Adapter) -> None:
        """Forget it; its name as well, unless that means a newer one."""


class Adapters:
    """The adapters of base model `base`, which clients call `BASE:NAME`."""

    def __init__(self, base: str, root: str, config: AdaptersConfig, engine: Engine) -> None:
        self.base = base
        place = config.dynamic_lora_loading_path
        is_address = "://" in place or place.startswith(("/", "~"))
        self._url = place if is_address else storage.join(root, place)
        self._config = config
        self._engine = engine
        self._contents: dict[str, str] = {}
        self._looked_at = -LOOK_S
        self._look_lock = asyncio.Lock()
        self._loaded: dict[str, Adapter] = {}  # by label, least recently used first
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._failed: dict[str, tuple[float, Refused]] = {}
        self._place = tempfile.TemporaryDirectory(prefix="manta-adapters-")

    def is_mine(self, model: str) -> bool:
        """Whether this is what an adapter would be called."""
        return model.startswith(f"{self.base}:")

    async def models(self) -> list[str]:
        """What all adapters in the storage are called."""
        return [f"{self.base}:{name}" for name in sorted(await self._look())]

    @contextlib.asynccontextmanager
    async def using(self, model: str) -> AsyncIterator[Adapter]:
        """The adapter is in the engine for the time of the block.

        Raises:
            Refused: there is none, the engine cannot use it, or all places are taken.
        """
        adapter = await self._ready(model)
        adapter.num_users += 1
        try:
            yield adapter
        finally:
            adapter.num_users -= 1
            if self._contents.get(adapter.name) != adapter.content:
                await self._let_go(adapter)

    async def _ready(self, model: str) -> Adapter:
        name = model.removeprefix(f"{self.base}:")
        content = (await self._look()).get(name)
        if content is None:
            what = f"The model `{model[:200]}` does not exist."
            raise Refused(404, "model_not_found", what, param="model")
        label = f"{name}@{content}"
        while label not in self._loaded:  # again, if it made room for another before its turn
            if label not in self._loading:
                self._loading[label] = asyncio.create_task(self._load(name, content))
            await asyncio.shield(self._loading[label])  # others may wait for it as well
        self._loaded[label] = self._loaded.pop(label)  # now the most recently used
        return self._loaded[label]

    # --- the storage -----------------------------------------------------------------------

    async def _look(self) -> dict[str, str]:
        """Name → content of what is in the folder; without the storage, of what was."""
        async with self._look_lock:
            if time.monotonic() - self._looked_at >= LOOK_S:
                try:
                    self._contents = await asyncio.to_thread(self._list)
                except MantaError as error:
                    logger.warning("adapters cannot be listed, will try again: %s", error)
                self._looked_at = time.monotonic()
        return self._contents

    def _list(self) -> dict[str, str]:
        marks: dict[str, dict[str, str]] = {}
        for path, mark in storage.file_marks(self._url).items():
            name, _, file = path.partition("/")
            if file in (CONFIG, WEIGHTS, storage.SEAL) and NAME.fullmatch(name):
                marks.setdefault(name, {})[file] = mark
        whole = {name: found for name, found in marks.items() if {CONFIG, WEIGHTS} <= set(found)}
        return {name: _digest(found) for name, found in whole.items()}

    def _copy(self, adapter: Adapter) -> None:
        """Raises MantaError if the storage fails, or the folder is not what its seal says."""
        shutil.rmtree(adapter.folder, ignore_errors=True)
        url = storage.join(self._url, adapter.name)
        sealed = storage.exists(storage.join(url, storage.SEAL))
        expected = storage.read_seal(url, f"adapter `{adapter.name}`")["files"] if sealed else {}
        for file in (CONFIG, WEIGHTS):
            storage.copy_file(storage.join(url, file), adapter.folder / file)
            found = storage.fingerprint_file(str(adapter.folder / file))
            if sealed and found != expected.get(file):
                raise MantaError(f"{file} is not what the seal says")

    # --- the engine ------------------------------------------------------------------------

    async def _load(self, name: str, content: str) -> None:
        folder = Path(self._place.name) / f"{name}@{content}"
        adapter = Adapter(name=name, content=content, folder=folder)
        try:
            self._raise_again(adapter.label)
            await self._make_room()
            await self._bring(adapter)
            self._loaded[adapter.label] = adapter
        finally:
            del self._loading[adapter.label]

    async def _bring(self, adapter: Adapter) -> None:
        try:
            await self._fetch(adapter)
            await self._give(adapter)
        except Refused as refusal:
            self._failed[adapter.label] = time.monotonic(), refusal
            shutil.rmtree(adapter.folder, ignore_errors=True)
            raise

    def _raise_again(self, label: str) -> None:
        """Spare storage and engine another try of what has just failed."""
        now = time.monotonic()
        recent = {key: it for key, it in self._failed.items() if now - it[0] < LOOK_S}
        self._failed = recent
        if label in recent:
            raise recent[label][1]

    async def _make_room(self) -> None:
        most = self._config.max_num_adapters_per_replica
        idle = [one for one in self._loaded.values() if one.num_users == 0]
        busy = len(self._loaded) + len(self._loading) - len(idle)
        if busy > most:
            raise overloaded(f"all {most} places for adapters are taken; try again")
        for oldest in idle[: max(0, busy + len(idle) - most)]:
            await self._let_go(oldest)

    async def _fetch(self, adapter: Adapter) -> None:
        for left in reversed(range(self._config.max_download_tries)):
            try:
                async with asyncio.timeout(self._config.download_timeout_s):
                    await asyncio.to_thread(self._copy, adapter)
                return
            except (MantaError, TimeoutError) as error:
                logger.warning("adapter `%s` cannot be fetched: %r", adapter.name, error)
                if not left:
                    what = f"adapter `{adapter.name}` cannot be fetched; try again"
                    raise Refused(503, "adapter_unavailable", what, kind="server_error") from None

    async def _give(self, adapter: Adapter) -> None:
        try:
            await self._engine.load(adapter)
        except Exception as error:  # whatever the engine raises for what it cannot use
            logger.warning("adapter `%s` cannot be loaded: %r", adapter.name, error)
            reason = (str(error).splitlines() or [""])[0].replace(str(adapter.folder), "")[:300]
            what = f"adapter `{adapter.name}` cannot be loaded: {reason}"
            raise bad_request(what, "model", "adapter_unusable") from None

    async def _let_go(self, adapter: Adapter) -> None:
        if adapter.num_users or self._loaded.pop(adapter.label, None) is None:
            return
        await self._engine.unload(adapter)
        await asyncio.to_thread(shutil.rmtree, adapter.folder, ignore_errors=True)


class VllmEngine:
    """Loads into vLLM, by the registry of models that its own HTTP routes use.

    Source: vllm/entrypoints/openai/models/serving.py of vLLM 0.29, `load_lora_adapter`, which
    would call an adapter's answers by its name and does not bound the names.
    """

    def __init__(self, base: str, models: Any) -> None:
        self._base = base
        self._models = models  # OpenAIServingModels

    async def load(self, adapter: Adapter) -> None:
        """As Engine has it."""
        from vllm.lora.request import LoRARequest

        adapter.number = self._models.lora_id_counter.inc(1)
        request = LoRARequest(
            lora_name=f"{self._base}:{adapter.label}",
            lora_int_id=adapter.number,
            lora_path=str(adapter.folder),
            base_model_name=self._base,
        )
        try:
            await self._models.engine_client.add_lora(request)
        except Exception as error:  # half in: it must not count as loaded when it is tried again
            await self._models.engine_client.remove_lora(adapter.number)
            cause = _CAUSE.search(str(error))
            raise ValueError(cause[1] if cause else str(error)) from error
        self._models.lora_requests[f"{self._base}:{adapter.name}"] = request

    async def unload(self, adapter: Adapter) -> None:
        """As Engine has it."""
        name = f"{self._base}:{adapter.name}"
        current = self._models.lora_requests.get(name)
        if current is not None and current.lora_int_id == adapter.number:
            del self._models.lora_requests[name]
        await self._models.engine_client.remove_lora(adapter.number)


def _digest(marks: dict[str, str]) -> str:
    text = "\0".join(f"{file}\0{mark}" for file, mark in sorted(marks.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:12]
