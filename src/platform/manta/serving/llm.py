"""`ray.serve.llm:build_openai_app`, for models that lie in Manta's storage.

Used as `import_path: manta.serving.llm:build_openai_app` in a native Serve config. The arguments
are Ray's own; only `model_source` may also be the name of a model that Manta trained, or the
storage URL of a sealed model folder. Each node that serves it fetches and verifies its own copy.
"""

from __future__ import annotations

from typing import Any

import ray
from ray.llm._internal.common.callbacks.base import CallbackBase
from ray.serve import Application
from ray.serve.llm import build_openai_app as build_ray_openai_app

from manta import storage
from manta.errors import InputError
from manta.workloads import layout


class ModelFromStorage(CallbackBase):  # type: ignore[misc]
    """Ray's hook around model loading: put a sealed model on the node, and load that."""

    async def on_before_node_init(self) -> None:
        """In the replica: give the engine the local path in place of the storage URL."""
        self.llm_config.get_engine_config().hf_model_id = self._fetch()
        table = ray.util.placement_group_table(self.ctx.placement_group)
        nodes = set(table["bundles_to_node_id"].values())
        # The files are here now. Ray would start a process for each node to ask for them again.
        self.ctx.run_init_node = nodes != {ray.get_runtime_context().get_node_id()}

    def on_before_download_model_files_distributed(self) -> None:
        """On every node of the replica's placement group; the path is the same on each."""
        self._fetch()

    def _fetch(self) -> str:
        url = self.kwargs["url"]
        return str(storage.cached_copy(url, f"model {url}"))


def build_openai_app(args: dict[str, Any]) -> Application:
    """Build the application, as Ray's builder does, from `llm_configs` with resolved sources.

    Raises:
        InputError: a named model does not exist in the storage, or its folder is damaged.
    """
    configs = [_resolve(config) for config in args.get("llm_configs", [])]
    return build_ray_openai_app({**args, "llm_configs": configs})


def _resolve(config: Any) -> Any:
    if not isinstance(config, dict):  # a path of a YAML file, which Ray reads
        return config
    loading = config.get("model_loading_config") or {}
    url = sealed_model(loading.get("model_source", loading.get("model_id")))
    if url is None:
        return config
    if "callback_config" in config:
        raise InputError("callback_config cannot be combined with a model of Manta", "remove it")
    return {
        **config,
        # Ray would fetch a URL itself, unverified; under its own id it waits for the callback.
        "model_loading_config": {**loading, "model_source": loading["model_id"]},
        "callback_config": {
            "callback_class": ModelFromStorage,
            "callback_kwargs": {"url": url},
        },
    }


def sealed_model(source: Any) -> str | None:
    """Folder of the sealed model that `source` means; None leaves it to Ray (hub id, plain URL).

    Raises:
        InputError: a name without a slash, and no such model in the storage.
    """
    if not isinstance(source, str):
        return None
    if "/" not in source:
        url = layout.model(source)
        storage.read_seal(url, f"model `{source}`")
        return url
    is_address = "://" in source or source.startswith(("/", "~"))
    return source if is_address and storage.exists(storage.join(source, storage.SEAL)) else None
