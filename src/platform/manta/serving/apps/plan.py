"""What deploying a Serve config will change, as a value; no network is touched.

Ray Serve takes the whole list of applications at once and deletes those that the list lacks. So
the applications that a file does not name are sent along, as they were last deployed.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from manta.errors import InputError
from manta.serving.apps.config import ServeConfig
from manta.serving.apps.difference import differences
from manta.serving.apps.surge import with_surge, without_surge

CANDIDATE = "--candidate"
"""Ends the name of an application that a new version is while its quality is checked."""


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """One deployment of a running application."""

    name: str
    status: str
    num_replicas: int
    """Replicas that run."""
    target_num_replicas: int
    message: str
    logs: tuple[tuple[str, str], ...] = ()
    """Node id and path of the log, of each replica that Serve still knows."""
    replicas: frozenset[str] = frozenset()
    """Ids of those that run."""


@dataclass(frozen=True, kw_only=True)
class App:
    """One application that Serve knows."""

    name: str
    status: str
    route_prefix: str | None
    message: str
    deployments: tuple[Deployment, ...]
    config_passthrough: Mapping[str, Any] | None
    """As deployed, in Ray's format; None if it came from Python code (`serve.run`)."""

    @property
    def replicas(self) -> frozenset[str]:
        """Ids of the replicas that run, of all deployments."""
        return frozenset(one for deployment in self.deployments for one in deployment.replicas)


@dataclass(frozen=True, kw_only=True)
class ServeState:
    """What Serve runs now."""

    apps: tuple[App, ...] = ()
    http_host: str | None = None
    """None if Serve does not run."""
    http_port: int | None = None
    options_passthrough: Mapping[str, Any] = field(default_factory=dict)
    """Ray's top-level options of the running Serve that a deploy would reset."""

    def app(self, name: str) -> App | None:
        """The application of that name, or None."""
        return next((app for app in self.apps if app.name == name), None)


@dataclass(frozen=True, kw_only=True)
class DeployPlan:
    """What one deploy sends, and what that changes."""

    file: str
    added: tuple[str, ...]
    changed: tuple[str, ...]
    unchanged: tuple[str, ...]
    kept: tuple[str, ...]
    """Applications that run and that the file does not name: they stay as they are."""
    differences: Mapping[str, tuple[str, ...]]
    """What differs from what runs, in lines, by name of the changed applications."""
    url: str
    """Where the applications will answer."""
    notes: tuple[str, ...]
    """What the file says and this deploy does not follow, and why."""
    body_passthrough: Mapping[str, Any]
    """The request body, in Ray's format."""

    @property
    def names(self) -> tuple[str, ...]:
        """Applications of the file."""
        return (*self.added, *self.changed, *self.unchanged)

    @property
    def apps_passthrough(self) -> dict[str, dict[str, Any]]:
        """Entries of the file's applications by name, with Serve's defaults for name and route."""
        sent = {app["name"]: app for app in self.body_passthrough["applications"]}
        return {name: without_surge(sent[name]) for name in self.names}

    def serve_command(self) -> str:
        """The plain command that this plan stands for."""
        command = shlex.join(["serve", "deploy", self.file])
        lost = f"   # alone it would delete: {', '.join(self.kept)}" if self.kept else ""
        return command + lost


def plan_deploy(
    current: ServeState,
    wanted: ServeConfig,
    *,
    serve_host: str,
    serve_port: int,
    surge: bool = True,
) -> DeployPlan:
    """Merge the file into what runs.

    Args:
        current: what Serve runs now.
        wanted: the file.
        serve_host: host that the cluster was started to serve on.
        serve_port: its port. Both win over the file; a Serve that runs wins over both.
        surge: start replacements before old replicas stop, where the file does not say.

    Raises:
        InputError: an application of the file wants the route of one that is kept.
    """
    named = {str(app["name"]): app for app in map(_with_name, wanted.applications_passthrough)}
    others = [app for app in _settled(current) if app.name not in named]
    kept = [app for app in others if app.config_passthrough is not None]
    for app in named.values():
        _check_route(app, others)
    running = {app.name: _as_written(app.config_passthrough) for app in current.apps}
    written = {name: _as_written(app) for name, app in named.items()}
    host, port = current.http_host or serve_host, current.http_port or serve_port
    return DeployPlan(
        file=wanted.file,
        added=tuple(name for name in named if name not in running),
        changed=tuple(n for n in named if n in running and running[n] != written[n]),
        unchanged=tuple(name for name in named if running.get(name) == written[name]),
        kept=tuple(app.name for app in others),
        differences={
            name: differences(now, written[name] or {})
            for name, now in running.items()
            if name in written and now is not None and now != written[name]
        },
        url=f"http://{_reachable(host)}:{port}",
        notes=tuple(_notes(current, wanted, host, port)),
        body_passthrough={
            **current.options_passthrough,
            **wanted.options_passthrough,
            "http_options": {**_http(current, wanted), "host": host, "port": port},
            "applications": [
                *(app.config_passthrough for app in kept),
                *(_sent(app, current.app(name), surge) for name, app in named.items()),
            ],
        },
    )


def plan_restore(current: ServeState, before: ServeState, names: Sequence[str]) -> dict[str, Any]:
    """The request body that puts the named applications back as they were, in Ray's format.

    One that did not run before is removed; what is not named stays as it is now. Where replicas
    of before still run, the config is sent as it was, so that they stay; else with surge.
    """
    kept = [app.config_passthrough for app in _settled(current) if app.name not in names]
    old = [
        _restored(app, current.app(app.name))
        for app in before.apps
        if app.name in names and app.config_passthrough is not None
    ]
    return {
        **before.options_passthrough,
        "http_options": {"host": current.http_host, "port": current.http_port},
        "applications": [*(config for config in kept if config is not None), *old],
    }


def plan_candidates(current: ServeState, apps: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The request body that runs `apps` beside all that runs, under names and routes of their own.

    In Ray's format. Without apps it removes the candidates that there are.
    """
    kept = [app.config_passthrough for app in _settled(current)]
    candidates = [
        {**app, "name": f"{app['name']}{CANDIDATE}", "route_prefix": candidate_route(app["name"])}
        for app in map(_with_name, apps)
    ]
    return {
        **current.options_passthrough,
        "http_options": {"host": current.http_host, "port": current.http_port},
        "applications": [*(config for config in kept if config is not None), *candidates],
    }


def candidate_route(name: str) -> str:
    """Where the candidate of an application answers."""
    return f"/-candidate/{name}"


def plan_undeploy(current: ServeState, name: str) -> dict[str, Any]:
    """The request body that removes one application and keeps the others, in Ray's format.

    Raises:
        InputError: there is no such application, or it was not deployed from a config.
    """
    app = current.app(name)
    if app is None:
        known = ", ".join(other.name for other in current.apps)
        raise InputError(f"no application `{name}`", f"known: {known}" if known else "none runs")
    if app.config_passthrough is None:
        raise InputError(
            f"application `{name}` was not deployed from a Serve config",
            f"remove it as it came, e.g. serve.delete({name!r})",
        )
    return {
        **current.options_passthrough,
        "http_options": {"host": current.http_host, "port": current.http_port},
        "applications": [
            other.config_passthrough
            for other in _settled(current)
            if other.name != name and other.config_passthrough is not None
        ],
    }


def _settled(current: ServeState) -> list[App]:
    """Without candidates: one that is there was left by a deploy that was killed."""
    return [app for app in current.apps if not app.name.endswith(CANDIDATE)]


def _with_name(app: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": "default", "route_prefix": "/", **app}  # Serve's own defaults


def _as_written(config: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    return None if config is None else without_surge(config)


def _sent(app: Mapping[str, Any], running: App | None, surge: bool) -> dict[str, Any]:
    """With surge for the deployments that run; Serve refuses names that the code lacks.

    Serve gives a deployment the application's environment variables only if `deployments` names
    it, and restarts it when that changes. So no name is added, or left out, without need.
    """
    if running is None or running.config_passthrough is None:
        return dict(app)
    now = running.config_passthrough
    if _as_written(now) == _as_written(app):
        return dict(now)
    if not surge:
        return dict(app)
    names = [one.name for one in running.deployments]
    if _code(now) == _code(app):
        listed = [*(now.get("deployments") or ()), *(app.get("deployments") or ())]
        names = [name for name in names if any(entry["name"] == name for entry in listed)]
    return with_surge(app, names)


def _restored(before: App, now: App | None) -> dict[str, Any]:
    assert before.config_passthrough is not None
    if now is None or before.replicas & now.replicas:
        return dict(before.config_passthrough)
    return with_surge(before.config_passthrough, [one.name for one in now.deployments])


def _code(app: Mapping[str, Any]) -> dict[str, Any]:
    """All but the options of single deployments."""
    return {key: value for key, value in app.items() if key != "deployments"}


def _check_route(app: Mapping[str, Any], others: list[App]) -> None:
    route = app["route_prefix"]
    for other in others:
        taken = (other.config_passthrough or {}).get("route_prefix", other.route_prefix)
        if route is not None and taken == route:
            raise InputError(
                f"application `{app['name']}` wants route {route}, which `{other.name}` has",
                f"choose another route_prefix, or `manta undeploy {other.name}` first",
            )


def _http(current: ServeState, wanted: ServeConfig) -> Mapping[str, Any]:
    """The file's other HTTP options; only a Serve that starts now reads them."""
    options: Mapping[str, Any] = wanted.options_passthrough.get("http_options", {})
    return options if current.http_port is None else {}


def _notes(current: ServeState, wanted: ServeConfig, host: str, port: int) -> list[str]:
    notes = []
    why = "Serve already runs there" if current.http_port else "the cluster was started so"
    if wanted.http_port not in (None, port):
        notes.append(f"{wanted.file} says port {wanted.http_port}; using {port}: {why}")
    if wanted.http_host not in (None, host):
        notes.append(f"{wanted.file} says host {wanted.http_host}; using {host}: {why}")
    ignored = sorted(wanted.options_passthrough.get("http_options", {}))
    if ignored and current.http_port is not None:
        notes.append(f"http_options {', '.join(ignored)} have no effect: Serve runs already")
    return notes


def _reachable(host: str) -> str:
    return "127.0.0.1" if host in ("0.0.0.0", "::") else host
