"""Applications on a running cluster, through Serve's REST API: deploy, list, remove."""

from __future__ import annotations

import time
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from manta import storage
from manta.cluster import dashboard
from manta.cluster.record import ClusterRecord
from manta.errors import MantaError
from manta.serving import config as configs
from manta.serving import owner
from manta.serving.config import ServeConfig
from manta.serving.owner import BUILDER
from manta.serving.plan import App, Deployment, DeployPlan, ServeState, plan_deploy, plan_undeploy
from manta.workloads import layout

API = "/api/serve/applications/"
POLL_S = 0.5
MODELS_VARIABLE = "MANTA_MODEL_CONTENT"
KEPT_OPTIONS = ("proxy_location", "target_capacity")
"""Top-level options that a deploy without them would reset."""
LOG_LINES = 15

Say = Callable[[str], None]


def apply(cluster: ClusterRecord, file: str, say: Say, timeout_s: float = 900) -> DeployPlan:
    """Plan and execute the deploy of a Serve config; returns when its applications answer.

    Raises:
        InputError: the file does not hold, or does not fit what runs.
        MantaError: an application failed, or was not healthy after `timeout_s`.
    """
    made = plan(cluster, file)
    for note in made.notes:
        say(note)
    execute(cluster, made, say, timeout_s)
    return made


def plan(cluster: ClusterRecord, file: str) -> DeployPlan:
    """What deploying `file` would change on this cluster."""
    wanted = pin_models(configs.read(file), cluster.storage_url)
    address = urllib.parse.urlsplit(cluster.serve_url)
    return plan_deploy(
        state(cluster),
        wanted,
        serve_host=address.hostname or "127.0.0.1",
        serve_port=address.port or 8000,
    )


def execute(cluster: ClusterRecord, plan: DeployPlan, say: Say, timeout_s: float = 900) -> None:
    """Send the plan and wait until every application of its file runs.

    Interrupting the wait leaves the deploy going.
    """
    started = time.time()
    sent = plan.body_passthrough["applications"]
    if any(app["name"] in plan.names and owner.is_guarded(app) for app in sent):
        say(f"callers need an API key; yours is in {owner.ensure_key(cluster)}")
    dashboard.put(cluster, API, plan.body_passthrough, timeout_s=120)
    deadline = time.monotonic() + timeout_s
    seen: dict[str, App] = {}
    said = ""
    while True:
        current = state(cluster)
        apps = [app for name in plan.names if (app := current.app(name)) is not None]
        seen |= {app.name: _with_logs(app, seen.get(app.name)) for app in apps}
        if (text := "; ".join(map(describe, apps))) != said:
            say(text)
            said = text
        for app in apps:
            if app.status in ("DEPLOY_FAILED", "UNHEALTHY"):
                raise _failure(cluster, seen[app.name])
        if len(apps) == len(plan.names) and all(app.status == "RUNNING" for app in apps):
            say(f"running after {time.time() - started:.1f} s at {plan.url}")
            return
        if time.monotonic() > deadline:
            raise MantaError(
                f"not healthy after {timeout_s:g} s: {said}",
                "the deploy goes on; watch it with `manta apps`",
            )
        time.sleep(POLL_S)


def undeploy(cluster: ClusterRecord, name: str, timeout_s: float = 120) -> None:
    """Remove one application and wait until it is gone; the others stay as they are."""
    dashboard.put(cluster, API, plan_undeploy(state(cluster), name), timeout_s=120)
    deadline = time.monotonic() + timeout_s
    while state(cluster).app(name) is not None:
        if time.monotonic() > deadline:
            raise MantaError(f"application `{name}` is still there after {timeout_s:g} s")
        time.sleep(POLL_S)


def state(cluster: ClusterRecord) -> ServeState:
    """What Serve runs on this cluster now."""
    details = dashboard.get(cluster, API, timeout_s=30)
    http = details.get("http_options") or {}
    return ServeState(
        apps=tuple(_app(name, app) for name, app in details["applications"].items()),
        http_host=http.get("host"),
        http_port=http.get("port"),
        options_passthrough={
            key: details[key] for key in KEPT_OPTIONS if details.get(key) is not None
        },
    )


def describe(app: App) -> str:
    """One line on how an application is."""
    parts = [
        f"{one.name} {one.status.lower()} ({one.num_replicas} of {one.target_num_replicas})"
        for one in app.deployments
        if app.status != "RUNNING"
    ]
    return f"{app.name} {app.status.lower()}" + (f": {', '.join(parts)}" if parts else "")


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
    sources = _model_sources(app)
    if not sources:
        return app
    content = ",".join(f"{name}={_content(name, storage_url)}" for name in sources)
    environment = app.get("runtime_env") or {}
    variables = {**(environment.get("env_vars") or {}), MODELS_VARIABLE: content}
    return {**app, "runtime_env": {**environment, "env_vars": variables}}


def _model_sources(app: Mapping[str, Any]) -> list[str]:
    """Names of Manta's models that the application serves."""
    if app.get("import_path") != BUILDER:
        return []
    llm_configs = (app.get("args") or {}).get("llm_configs") or []
    loadings = [c.get("model_loading_config") or {} for c in llm_configs if isinstance(c, dict)]
    sources = [loading.get("model_source", loading.get("model_id")) for loading in loadings]
    return [source for source in sources if isinstance(source, str) and "/" not in source]


def _content(name: str, storage_url: str) -> str:
    url = layout.model(name, storage_url)
    return layout.model_content(storage.read_seal(url, f"model `{name}`"))


def _app(name: str, details: Mapping[str, Any]) -> App:
    return App(
        name=name,
        status=details["status"],
        route_prefix=details["route_prefix"],
        message=details["message"],
        deployments=tuple(_deployment(one) for one in details["deployments"].values()),
        config_passthrough=details["deployed_app_config"],
    )


def _deployment(details: Mapping[str, Any]) -> Deployment:
    replicas: Sequence[Mapping[str, Any]] = details["replicas"]
    return Deployment(
        name=details["name"],
        status=details["status"],
        num_replicas=sum(replica["state"] == "RUNNING" for replica in replicas),
        target_num_replicas=details["target_num_replicas"],
        message=details["message"],
        logs=tuple(
            (replica["node_id"], replica["log_file_path"])
            for replica in replicas
            if replica.get("node_id") and replica.get("log_file_path")
        ),
    )


def _with_logs(app: App, before: App | None) -> App:
    """Remember the logs of replicas that Serve has given up meanwhile."""
    old = {one.name: one.logs for one in before.deployments} if before else {}
    deployments = [replace(d, logs=d.logs or old.get(d.name, ())) for d in app.deployments]
    return replace(app, deployments=tuple(deployments))


def _failure(cluster: ClusterRecord, app: App) -> MantaError:
    lines = [
        f"application `{app.name}` {app.status.lower().replace('_', ' ')}",
        app.message.strip(),
    ]
    for one in app.deployments:
        if one.status == "HEALTHY":
            continue
        lines.append(f"{one.name}: {one.message.strip()}")
        for node_id, path in one.logs[:1]:
            lines += [f"the end of {path}:", _log_tail(cluster, node_id, path)]
    lines.append(f"other applications go on; remove this one with `manta undeploy {app.name}`")
    return MantaError("\n".join(line for line in lines if line))


def _log_tail(cluster: ClusterRecord, node_id: str, path: str) -> str:
    query = urllib.parse.urlencode(
        {"node_id": node_id, "filename": path.lstrip("/"), "lines": LOG_LINES}
    )
    try:
        return dashboard.get_text(cluster, f"/api/v0/logs/file?{query}", timeout_s=10).strip()
    except MantaError as error:
        return f"(cannot be read: {error.what})"
