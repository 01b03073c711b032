"""The models that LLM applications serve: which content, whole or damaged, still there or not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from manta import storage
from manta.errors import InputError
from manta.serving.access.owner import BUILDER
from manta.serving.apps.config import ServeConfig
from manta.spec.serve import SPLIT
from manta.workloads import layout

MODELS_VARIABLE = "MANTA_MODEL_CONTENT"
MAX_VERIFIED_BYTES = 4 * 2**30
"""Read whole before a deploy, in seconds; replicas verify all models before they answer."""


def pin_models(wanted: ServeConfig, storage_url: str) -> ServeConfig:
    """Note which content of Manta's models an application serves, in its environment.

    Serve restarts an application only if its config changed; without this, one whose model was
    trained again under the same name would go on serving the old weights.

    Raises:
        InputError: a named model is not in the storage.
    """
    apps = tuple(_pinned(app, storage_url) for app in wanted.applications_passthrough)
    return replace(wanted, applications_passthrough=apps)


def _pinned(app: dict[str, Any], storage_url: str) -> dict[str, Any]:
    app = _numbered(app, storage_url)
    names = [source for source in sources(app) if "/" not in source]
    if not names:
        return app
    content = ",".join(f"{name}={_content(name, storage_url)}" for name in names)
    environment = app.get("runtime_env") or {}
    variables = {**(environment.get("env_vars") or {}), MODELS_VARIABLE: content}
    return {**app, "runtime_env": {**environment, "env_vars": variables}}


def _numbered(app: dict[str, Any], storage_url: str) -> dict[str, Any]:
    """`NAME@ALIAS` as the version that it means now: so it stays until the next deploy, also for
    replicas that start later, and a rollback goes back to it.
    """
    aliases = [source for source in sources(app) if "/" not in source and "@" in source]
    if not aliases:
        return app
    arguments = {**(app.get("args") or {})}
    if "llm_configs" in arguments:
        configs = arguments["llm_configs"]
        arguments["llm_configs"] = [_with_version(one, storage_url) for one in configs]
    for part in SPLIT:
        if part in arguments:
            arguments[part] = _with_version(arguments[part], storage_url)
    return {**app, "args": arguments}


def _with_version(config: Any, storage_url: str) -> Any:
    if not isinstance(config, dict):
        return config
    loading = config.get("model_loading_config") or {}
    source = loading.get("model_source", loading.get("model_id"))
    if not isinstance(source, str) or "/" in source or "@" not in source:
        return config
    version = layout.name_of_version(source, storage_url)
    return {**config, "model_loading_config": {**loading, "model_source": version}}


def sources(app: Mapping[str, Any]) -> list[str]:
    """What an LLM application's models are loaded from: names, addresses, hub ids."""
    if app.get("import_path") != BUILDER:
        return []
    arguments = app.get("args") or {}
    configs = [*(arguments.get("llm_configs") or ()), *map(arguments.get, SPLIT)]
    loadings = [c.get("model_loading_config") or {} for c in configs if isinstance(c, dict)]
    found = [loading.get("model_source", loading.get("model_id")) for loading in loadings]
    return [source for source in found if isinstance(source, str)]


def _content(name: str, storage_url: str) -> str:
    url = layout.model(name, storage_url)
    return layout.model_content(storage.read_seal(url, f"model `{name}`"))


def verify(app: Mapping[str, Any], storage_url: str) -> None:
    """Read the sealed models of an application and compare them with their seals.

    Raises:
        InputError: a model is missing, unfinished or damaged.
    """
    for source in sources(app):
        url = layout.model(source, storage_url) if "/" not in source else source
        is_address = "://" in source or source.startswith(("/", "~"))
        if "/" in source and not (is_address and storage.exists(storage.join(url, storage.SEAL))):
            continue  # a hub id, or a folder that nobody sealed: Ray's own way
        what = f"model `{source}`"
        seal = storage.read_seal(url, what)
        if sum(mark["size_bytes"] for mark in seal["files"].values()) <= MAX_VERIFIED_BYTES:
            storage.verify(url, what)


def gone(app: Mapping[str, Any], storage_url: str) -> tuple[str, ...]:
    """Models whose content, as pinned in this config, is no longer in the storage."""
    variables = (app.get("runtime_env") or {}).get("env_vars") or {}
    pinned = str(variables.get(MODELS_VARIABLE, ""))
    wanted = dict(pair.partition("=")[::2] for pair in pinned.split(",") if pair)
    return tuple(name for name, content in wanted.items() if not _is(name, content, storage_url))


def _is(name: str, content: str, storage_url: str) -> bool:
    try:
        return _content(name, storage_url) == content
    except InputError:
        return False
