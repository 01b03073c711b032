"""The models that LLM applications serve: which content, whole or damaged, still there or not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from manta import storage
from manta.errors import InputError
from manta.serving.access.owner import BUILDER
from manta.serving.apps import hub
from manta.serving.apps.config import ServeConfig
from manta.spec.serve import SPLIT
from manta.workloads import layout

MODELS_VARIABLE = "MANTA_MODEL_CONTENT"
MAX_VERIFIED_BYTES = 4 * 2**30
"""Read whole before a deploy, in seconds; replicas verify all models before they answer."""


def pin_models(wanted: ServeConfig, storage_url: str) -> ServeConfig:
    """Note which content of Manta's models an application serves, in its environment.

    Serve restarts an application only if its config changed; without this, one whose model was
    trained again under the same name would go on serving the old weights. Of a model of the Hub
    the commit becomes its `revision`.

    Raises:
        InputError: a named model is not in the storage, or not on the Hub.
        MantaError: the Hub cannot be reached.
    """
    apps = tuple(_pinned(app, storage_url) for app in wanted.applications_passthrough)
    return replace(wanted, applications_passthrough=apps)


def _pinned(app: dict[str, Any], storage_url: str) -> dict[str, Any]:
    app = _at_commits(_numbered(app, storage_url))
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
    return _with_configs(app, lambda config: _with_version(config, storage_url))


def _at_commits(app: dict[str, Any]) -> dict[str, Any]:
    """Models of the Hub at the commit that they have now, for the same reasons."""
    if not any(map(is_hub_id, sources(app))):
        return app
    shared = (app.get("runtime_env") or {}).get("env_vars") or {}
    return _with_configs(app, lambda config: _at_commit(config, shared))


def _at_commit(config: dict[str, Any], shared: Mapping[str, str]) -> dict[str, Any]:
    source = _source(config)
    if not is_hub_id(source):
        return config
    environment = config.get("runtime_env") or {}
    own = environment.get("env_vars") or {}
    engine = config.get("engine_kwargs") or {}
    seen = hub.hub_of({**shared, **own})
    if (commit := hub.commit(seen, source, engine.get("revision"))) is None or seen.offline:
        return config
    # A local cluster's processes are offline unless they are told otherwise.
    online = {"HF_HUB_OFFLINE": "0", **shared, **own}["HF_HUB_OFFLINE"]
    return {
        **config,
        "engine_kwargs": {**engine, "revision": commit},
        "runtime_env": {**environment, "env_vars": {**own, "HF_HUB_OFFLINE": online}},
    }


def is_hub_id(source: Any) -> bool:
    """`ORG/NAME`, which is neither an address nor a path."""
    is_address = isinstance(source, str) and (
        "://" in source or source.startswith(("/", "~", "."))
    )
    return isinstance(source, str) and "/" in source and not is_address


def _with_configs(
    app: dict[str, Any], changed: Callable[[dict[str, Any]], dict[str, Any]]
) -> dict[str, Any]:
    """The application with each of its LLM configs changed."""

    def each(config: Any) -> Any:  # a path of a YAML file is read by Ray alone
        return changed(config) if isinstance(config, dict) else config

    arguments = {**(app.get("args") or {})}
    if "llm_configs" in arguments:
        arguments["llm_configs"] = [each(config) for config in arguments["llm_configs"]]
    for part in SPLIT:
        if part in arguments:
            arguments[part] = each(arguments[part])
    return {**app, "args": arguments}


def _source(config: Mapping[str, Any]) -> Any:
    loading = config.get("model_loading_config") or {}
    return loading.get("model_source", loading.get("model_id"))


def _with_version(config: dict[str, Any], storage_url: str) -> dict[str, Any]:
    loading = config.get("model_loading_config") or {}
    source = _source(config)
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
    found = [_source(config) for config in configs if isinstance(config, dict)]
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
