"""`ray.serve.llm:build_openai_app`, for models that lie in Manta's storage.

Used as `import_path: manta.serving.llm:build_openai_app` in a native Serve config. The arguments
are Ray's own; only `model_source` may also be the name of a model that Manta trained, or the
storage URL of a sealed model folder. Each node that serves it fetches and verifies its own copy.
Beside them, `guard` (manta.spec.guard) says who may call; without it, who has an API key.
With `prefill_config` and `decode_config` in place of `llm_configs` it is Ray's
`build_pd_openai_app`: one engine reads prompts, another writes the answers.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import replace
from typing import Any, TypeVar

import ray
from pydantic import ValidationError
from ray.llm._internal.common.callbacks.base import CallbackBase
from ray.llm._internal.serve.constants import RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING
from ray.serve import Application
from ray.serve.context import _serve_request_context
from ray.serve.llm import LLMServer
from ray.serve.llm import build_openai_app as build_ray_openai_app
from ray.serve.llm import build_pd_openai_app as build_ray_split_app
from ray.serve.llm.ingress import OpenAiIngress

from manta import storage
from manta.errors import InputError
from manta.serving.engine import fatal, request_faults
from manta.serving.engine.adapters import Adapters, VllmEngine
from manta.serving.engine.direct import chosen_by_haproxy, untold
from manta.serving.engine.engine_app import EngineApp
from manta.serving.guard.guard import App
from manta.serving.guard.ingress import guarded_class
from manta.serving.request import media
from manta.spec import Spec
from manta.spec.adapters import AdaptersConfig
from manta.spec.guard import GuardConfig
from manta.spec.serve import SPLIT
from manta.workloads import layout

Settings = TypeVar("Settings", bound=Spec)

_NO_DIRECT_STREAMING = '`runtime_env: {env_vars: {RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING: "0"}}`'


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
    """Build the application, as Ray's builders do, from LLM configs with resolved sources.

    Raises:
        InputError: a named model does not exist in the storage, its folder is damaged, or
            `guard` says what it cannot say.
    """
    guard = _checked(GuardConfig, args.get("guard") or {}, "guard", "docs/serving.md")
    if any(key in args for key in SPLIT):
        return _split_app(args, guard)
    configs = [_resolve(config) for config in args.get("llm_configs", [])]
    ours = {**args, "llm_configs": configs}
    ours.pop("guard", None)
    app = build_ray_openai_app(_guard(ours, guard))
    return chosen_by_haproxy(app, configs[0]) if RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING else app


def _split_app(args: dict[str, Any], guard: GuardConfig) -> Application:
    """Prefill and decode apart; clients reach the ingress, and the guard stands there."""
    missing = [key for key in SPLIT if not isinstance(args.get(key), dict)]
    if missing or "llm_configs" in args:
        what = f"`{missing[0]}` is missing" if missing else "`llm_configs` stands beside them"
        raise InputError(f"prefill and decode apart: {what}", f"give {' and '.join(SPLIT)} only")
    if RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING:
        raise InputError(
            "prefill and decode apart need an ingress, which direct streaming leaves out",
            f"write for this application at its top level {_NO_DIRECT_STREAMING}",
        )
    ours = {**args, **{key: _resolve(args[key]) for key in SPLIT}}
    ours.pop("guard", None)
    return build_ray_split_app(_guard_ingress(ours, guard))


def _checked(kind: type[Settings], value: Any, name: str, page: str) -> Settings:
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join([name, *map(str, fault["loc"])])
        raise InputError(f"{where}: {fault['msg']}", f"see {page}") from None


def _guard(args: dict[str, Any], config: GuardConfig) -> dict[str, Any]:
    """Put the guard into whichever class answers HTTP."""
    if RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING:  # the engine's own deployment, without an ingress
        if len(args["llm_configs"]) > 1:
            raise InputError(
                "with direct streaming an application serves one model",
                "write one application for each, or for this one at its top level "
                f"{_NO_DIRECT_STREAMING}",
            )
        return {**args, "llm_configs": [_guard_server(one, config) for one in args["llm_configs"]]}
    return _guard_ingress(args, config)


def _guard_ingress(args: dict[str, Any], config: GuardConfig) -> dict[str, Any]:
    ingress = args.get("ingress_cls_config") or {}
    base = _class(ingress.get("ingress_cls", OpenAiIngress))
    return {
        **args,
        "ingress_cls_config": {
            **ingress,
            "ingress_cls": guarded_class(base, config, storage.root(), _in_openais_words),
        },
    }


def _guard_server(llm_config: Any, config: GuardConfig) -> dict[str, Any]:
    if not isinstance(llm_config, dict):
        raise InputError(
            f"{llm_config}: direct streaming with a guard needs the LLM config itself",
            "write it in place of its path",
        )
    base = _class(llm_config.get("server_cls") or LLMServer)
    model_id = str((llm_config.get("model_loading_config") or {}).get("model_id"))
    inside = functools.partial(_behind_guard, _adapters_config(llm_config), model_id)
    server = guarded_class(untold(base), config, storage.root(), inside)
    ours = {**llm_config, "server_cls": server}
    ours.pop("lora_config", None)  # Ray would load adapters itself, from fewer places
    return ours


def _adapters_config(llm_config: dict[str, Any]) -> AdaptersConfig | None:
    given = llm_config.get("lora_config")
    if given is None:
        return None
    if not (llm_config.get("engine_kwargs") or {}).get("enable_lora"):
        raise InputError(
            "lora_config needs an engine that loads adapters",
            "write `enable_lora: true` in engine_kwargs, and `max_lora_rank` if it is over 16",
        )
    return _checked(AdaptersConfig, given, "lora_config", "docs/clients.md")


def _behind_guard(adapters: AdaptersConfig | None, model_id: str, app: Any, root: str) -> App:
    """In the replica, around the engine's application once the engine runs."""
    fatal.refuse(app.state.engine_client)
    request_faults.watch(app, app.state.engine_client)
    if adapters is None:
        return EngineApp(app, before=_forget_header)
    engine = VllmEngine(model_id, app.state.openai_serving_models)
    return EngineApp(app, Adapters(model_id, root, adapters, engine), before=_forget_header)


def _in_openais_words(app: App, root: str) -> App:
    """In the replica of Ray's ingress."""
    return EngineApp(app)


def _forget_header() -> None:
    """Forget what a client says, in a header of Serve's, of the adapter that it wants.

    Ray would load that adapter itself, and fails with status 500 where it cannot.
    """
    context = _serve_request_context.get()
    if context is not None and context.multiplexed_model_id:
        _serve_request_context.set(replace(context, multiplexed_model_id=""))


def _class(given: Any) -> type:
    if isinstance(given, str):
        module, _, name = given.replace(":", ".").rpartition(".")
        given = getattr(importlib.import_module(module), name)
    assert isinstance(given, type)
    return given


def _resolve(config: Any) -> Any:
    if not isinstance(config, dict):  # a path of a YAML file, which Ray reads
        return config
    config = _fetching_nothing(config)
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


def _fetching_nothing(config: dict[str, Any]) -> dict[str, Any]:
    """Closed where the config says nothing: vLLM fetches pictures from wherever clients say.

    A host that is named may not send it on to another.
    """
    engine = {"allowed_media_domains": [media.CLOSED], **(config.get("engine_kwargs") or {})}
    environment = config.get("runtime_env") or {}
    variables = {"VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0", **(environment.get("env_vars") or {})}
    return {
        **config,
        "engine_kwargs": engine,
        "runtime_env": {**environment, "env_vars": variables},
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
