"""Applications on a running cluster, through Serve's REST API: deploy, list, remove."""

from __future__ import annotations

import time
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from manta.cluster import dashboard
from manta.cluster.record import ClusterRecord
from manta.errors import MantaError
from manta.serving.apps import config as configs
from manta.serving.apps.config import ServeConfig
from manta.serving.apps.models import pin_models
from manta.serving.apps.plan import App, Deployment, DeployPlan, ServeState, plan_deploy

API = "/api/serve/applications/"
POLL_S = 0.5
KEPT_OPTIONS = ("proxy_location", "target_capacity")
"""Top-level options that a deploy without them would reset."""
LOG_LINES = 15
SILENCE_S = 60.0
"""How long a dashboard that does not answer is asked again."""

Say = Callable[[str], None]


class NotHealthy(MantaError):
    """An application failed, or was not healthy in time.

    Args:
        what: everything that is known, logs included.
        short: one line of it, without logs.
        fix: as in MantaError.
    """

    def __init__(self, what: str, short: str, fix: str = "") -> None:
        super().__init__(what, fix)
        self.short = short


def plan(
    cluster: ClusterRecord, wanted: ServeConfig, current: ServeState, surge: bool = True
) -> DeployPlan:
    """What deploying `wanted` would change on this cluster. Raises InputError as `plan_deploy`."""
    address = urllib.parse.urlsplit(cluster.serve_url)
    return plan_deploy(
        current,
        wanted,
        serve_host=address.hostname or "127.0.0.1",
        serve_port=address.port or 8000,
        surge=surge,
    )


def read(cluster: ClusterRecord, file: str) -> ServeConfig:
    """The Serve config in `file`, with the content of Manta's models noted in it.

    Raises:
        InputError: the file does not hold, or a model of it is not in the storage.
    """
    return pin_models(configs.read(file), cluster.storage_url)


def send(cluster: ClusterRecord, body_passthrough: Mapping[str, Any]) -> None:
    """Give Serve the whole list of applications. Raises MantaError if it refuses."""
    dashboard.put(cluster, API, body_passthrough, timeout_s=120)


def wait_healthy(
    cluster: ClusterRecord, names: Sequence[str], say: Say, timeout_s: float
) -> ServeState:
    """Return when every named application runs, with what Serve then runs.

    Raises:
        NotHealthy: one failed, or did not run after `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    seen: dict[str, App] = {}
    said = ""
    while True:
        current = patient_state(cluster)
        apps = [app for name in names if (app := current.app(name)) is not None]
        seen |= {app.name: _with_logs(app, seen.get(app.name)) for app in apps}
        if (text := "; ".join(map(describe, apps))) != said:
            say(text)
            said = text
        for app in apps:
            if app.status in ("DEPLOY_FAILED", "UNHEALTHY"):
                raise _failure(cluster, seen[app.name])
        if len(apps) == len(names) and all(app.status == "RUNNING" for app in apps):
            return current
        if time.monotonic() > deadline:
            what = f"not healthy after {timeout_s:g} s: {said}"
            raise NotHealthy(_with_messages(what, apps), what)
        time.sleep(POLL_S)


def wait_gone(cluster: ClusterRecord, name: str, timeout_s: float) -> None:
    """Return when Serve knows no application `name`. Raises MantaError after `timeout_s`."""
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


def patient_state(cluster: ClusterRecord) -> ServeState:
    """The state, though the dashboard may be silent for a while: that is no reason to go back."""
    deadline = time.monotonic() + SILENCE_S
    while True:
        try:
            return state(cluster)
        except MantaError:
            if time.monotonic() > deadline:
                raise
            time.sleep(POLL_S)


def describe(app: App) -> str:
    """One line on how an application is."""
    parts = [
        f"{one.name} {one.status.lower()} ({one.num_replicas} of {one.target_num_replicas})"
        for one in app.deployments
        if app.status != "RUNNING"
    ]
    return f"{app.name} {app.status.lower()}" + (f": {', '.join(parts)}" if parts else "")


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
        replicas=frozenset(r["replica_id"] for r in replicas if r["state"] == "RUNNING"),
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


def _failure(cluster: ClusterRecord, app: App) -> NotHealthy:
    first = f"application `{app.name}` {app.status.lower().replace('_', ' ')}"
    lines = [first, app.message.strip()]
    for one in app.deployments:
        if one.status == "HEALTHY":
            continue
        lines.append(f"{one.name}: {one.message.strip()}")
        for node_id, path in one.logs[:1]:
            lines += [f"the end of {path}:", _log_tail(cluster, node_id, path)]
    told = [one.message for one in app.deployments if one.message] or [app.message]
    reason = told[0].strip().splitlines()[-1:] or [""]
    return NotHealthy("\n".join(line for line in lines if line), f"{first}: {reason[0].strip()}")


def _with_messages(what: str, apps: Sequence[App]) -> str:
    told = [f"{d.name}: {d.message.strip()}" for app in apps for d in app.deployments if d.message]
    return "\n".join([what, *told])


def _log_tail(cluster: ClusterRecord, node_id: str, path: str) -> str:
    query = urllib.parse.urlencode(
        {"node_id": node_id, "filename": path.lstrip("/"), "lines": LOG_LINES}
    )
    try:
        return dashboard.get_text(cluster, f"/api/v0/logs/file?{query}", timeout_s=10).strip()
    except MantaError as error:
        return f"(cannot be read: {error.what})"
