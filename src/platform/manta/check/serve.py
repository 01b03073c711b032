"""Rules over Serve configs: keys, names, counts, and what an apply does to other apps."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from manta.check.facts.serving import SERVE_KEYS
from manta.check.rules import Fault, File, Project, misspelt_keys, rule, unknown_keys
from manta.spec.loading import Path_
from manta.spec.serve import Application, Deployment, ServeSpec

_DEPLOYMENT = "applications.deployments"
_KEYS: Mapping[str, frozenset[str]] = {
    "": SERVE_KEYS["ServeDeploySchema"],
    "http_options": SERVE_KEYS["HTTPOptionsSchema"],
    "grpc_options": SERVE_KEYS["gRPCOptionsSchema"],
    "controller_options": SERVE_KEYS["ControllerOptions"],
    "applications": SERVE_KEYS["ServeApplicationSchema"],
    _DEPLOYMENT: SERVE_KEYS["DeploymentSchema"],
    f"{_DEPLOYMENT}.ray_actor_options": SERVE_KEYS["RayActorOptionsSchema"],
    f"{_DEPLOYMENT}.autoscaling_config": SERVE_KEYS["AutoscalingConfig"] | {"_policy"},
    f"{_DEPLOYMENT}.request_router_config": SERVE_KEYS["RequestRouterConfig"],
    f"{_DEPLOYMENT}.gang_scheduling_config": SERVE_KEYS["GangSchedulingConfig"],
    f"{_DEPLOYMENT}.backpressure_config": SERVE_KEYS["BackpressureConfig"],
    **{
        f"{prefix}{key}": SERVE_KEYS[model]
        for prefix in ("", "applications.", f"{_DEPLOYMENT}.")
        for key, model in (
            ("logging_config", "LoggingConfig"),
            ("tracing_config", "TracingConfig"),
        )
    },
}


def spec(file: File) -> ServeSpec:
    """The typed spec; rules run only on files that have one."""
    assert isinstance(file.spec, ServeSpec)
    return file.spec


def applications(file: File) -> Iterator[tuple[Path_, Application]]:
    """Each application, with its path."""
    for i, application in enumerate(spec(file).applications):
        yield ("applications", i), application


def deployments(file: File) -> Iterator[tuple[Path_, Deployment]]:
    """Each deployment of each application, with its path."""
    for path, application in applications(file):
        for i, deployment in enumerate(application.deployments):
            yield (*path, "deployments", i), deployment


@rule("serve-misspelt-key", "error", "serve")
def misspelt(file: File, project: Project) -> Iterable[Fault]:
    """Ray's schema ignores unknown keys, so a misspelt one has silently no effect."""
    return misspelt_keys(file.value, (), _KEYS)


@rule("serve-unusual-key", "warning", "serve")
def unusual(file: File, project: Project) -> Iterable[Fault]:
    """Ray ignores keys that it does not know."""
    return unknown_keys(file.value, (), _KEYS)


@rule("serve-name-twice", "error", "serve")
def name_twice(file: File, project: Project) -> Iterator[Fault]:
    """Ray refuses two applications of one name or route, and two deployments of one name."""
    names: set[str] = set()
    routes: set[str] = set()
    for path, application in applications(file):
        if application.name in names:
            what = f"two applications are named `{application.name}`"
            yield Fault((*path, "name"), what, "give each its own name")
        route = application.route_prefix
        if route is not None and route in routes:
            what = f"two applications answer at `{route}`"
            yield Fault((*path, "route_prefix"), what, f"e.g. route_prefix: /{application.name}")
        names.add(application.name)
        routes |= {route} if route is not None else set()
        yield from _deployment_names(path, application)


def _deployment_names(path: Path_, application: Application) -> Iterator[Fault]:
    seen: set[str] = set()
    for i, deployment in enumerate(application.deployments):
        if deployment.name in seen:
            what = f"two deployments are named `{deployment.name}`"
            yield Fault((*path, "deployments", i, "name"), what, "merge them")
        seen.add(deployment.name)


@rule("serve-name-empty", "error", "serve")
def name_empty(file: File, project: Project) -> Iterator[Fault]:
    """Ray refuses an application without a name."""
    for path, application in applications(file):
        if not application.name:
            yield Fault((*path, "name"), "the application's name is empty", "e.g. name: llm")


@rule("serve-route", "error", "serve")
def route(file: File, project: Project) -> Iterator[Fault]:
    """Ray refuses routes that do not begin with /, end with /, or have {…} in them."""
    for path, application in applications(file):
        prefix = application.route_prefix
        if prefix is None:
            continue
        bad = not prefix.startswith("/") or (prefix != "/" and prefix.endswith("/"))
        if bad or "{" in prefix:
            fix = f"write /{prefix.strip('/').replace('{', '').replace('}', '')}"
            yield Fault((*path, "route_prefix"), f"`{prefix}` is not a route", fix)


@rule("serve-import-path", "error", "serve")
def import_path(file: File, project: Project) -> Iterator[Fault]:
    """Ray imports `module:name`; it refuses any other form."""
    for path, application in applications(file):
        if not re.fullmatch(
            r"[^:.\s][^:\s]*:[^:\s]+|[^:.\s][^:\s]*\.[^:.\s]+", application.import_path
        ):
            what = f"`{application.import_path}` is not MODULE:NAME"
            yield Fault((*path, "import_path"), what, "e.g. ray.serve.llm:build_openai_app")


@rule("serve-app-address", "error", "serve")
def app_address(file: File, project: Project) -> Iterator[Fault]:
    """Ray refuses a host or port inside an application."""
    for i, application in enumerate(file.value["applications"]):
        for key in ("host", "port"):
            if key in application:
                fix = f"write http_options: {{{key}: …}} at the top"
                yield Fault(("applications", i, key), f"an application takes no `{key}`", fix)


@rule("serve-counts", "error", "serve")
def counts(file: File, project: Project) -> Iterator[Fault]:
    """Replica counts that contradict each other; Ray refuses them."""
    for path, deployment in deployments(file):
        scaling = deployment.autoscaling_config
        if scaling is None:
            continue
        if isinstance(deployment.num_replicas, int):
            what = "num_replicas stands beside autoscaling_config"
            fix = "keep one; a fixed start is autoscaling_config.initial_replicas"
            yield Fault((*path, "num_replicas"), what, fix)
        low = 1 if scaling.min_replicas is None else scaling.min_replicas
        high = scaling.max_replicas or (100 if deployment.num_replicas == "auto" else 1)
        at = (*path, "autoscaling_config")
        if low > high:
            what = f"min_replicas {low} is over max_replicas {high}"
            yield Fault((*at, "min_replicas"), what, f"write max_replicas: {low} or more")
        start = scaling.initial_replicas
        if start is not None and low <= high and not low <= start <= high:
            what = f"initial_replicas {start} is not between {low} and {high}"
            yield Fault((*at, "initial_replicas"), what, f"write {low} to {high}")


@rule("serve-external-scaler", "error", "serve")
def external_scaler(file: File, project: Project) -> Iterator[Fault]:
    """Ray refuses its own autoscaling in an application that an external scaler drives."""
    for path, application in applications(file):
        for i, deployment in enumerate(application.deployments):
            scales = deployment.autoscaling_config or deployment.num_replicas == "auto"
            if application.external_scaler_enabled and scales:
                what = "autoscaling beside external_scaler_enabled"
                yield Fault((*path, "deployments", i), what, "keep one of the two")


@rule("serve-bundles", "error", "serve")
def bundles(file: File, project: Project) -> Iterator[Fault]:
    """The replica's actor lives in the first bundle, which must hold it; Ray refuses otherwise."""
    for path, deployment in deployments(file):
        groups, options = deployment.placement_group_bundles, deployment.ray_actor_options
        at = (*path, "placement_group_bundles")
        if not groups:
            continue
        if deployment.max_replicas_per_node is not None:
            what = "max_replicas_per_node stands beside placement_group_bundles"
            yield Fault((*path, "max_replicas_per_node"), what, "keep one")
        asked = {
            "CPU": options.num_cpus if options and options.num_cpus is not None else 1.0,
            "GPU": options.num_gpus or 0.0 if options else 0.0,
        }
        for resource, amount in asked.items():
            if amount > groups[0].get(resource, 0):
                has = groups[0].get(resource, 0)
                what = f"the first bundle has {has:g} {resource}, the replica needs {amount:g}"
                yield Fault((*at, 0), what, f"write {resource}: {amount:g} there")


@rule("serve-open", "warning", "serve")
def listens_everywhere(file: File, project: Project) -> Iterator[Fault]:
    """Serve's HTTP port asks for no credential; Ray's token does not cover it."""
    options = spec(file).http_options
    if options and options.host in ("0.0.0.0", "::", ""):
        what = f"the endpoint listens on {options.host or 'every address'}"
        yield Fault(("http_options", "host"), what, "write 127.0.0.1, behind a proxy that asks")


@rule("serve-app-deleted", "warning", "serve")
def app_deleted(file: File, project: Project) -> Iterator[Fault]:
    """`serve deploy` deletes every application that its file does not list."""
    own = {application.name for application in spec(file).applications}
    others = {
        application.name: other.name
        for other in project.of_kind("serve")
        if other is not file and isinstance(other.spec, ServeSpec)
        for application in other.spec.applications
        if application.name not in own
    }
    if others and own:
        names = ", ".join(f"`{name}` ({where})" for name, where in sorted(others.items()))
        fix = "apply with `manta deploy`, which keeps them, or list all in one file"
        yield Fault(("applications",), f"`serve deploy` of this file deletes {names}", fix)


@rule("serve-app-in-two-files", "warning", "serve")
def app_in_two_files(file: File, project: Project) -> Iterator[Fault]:
    """Of two files that define one application only the last that is applied counts."""
    earlier: dict[str, str] = {}
    for other in project.of_kind("serve"):
        if other is file:
            break
        if isinstance(other.spec, ServeSpec):
            earlier |= {application.name: other.name for application in other.spec.applications}
    for path, application in applications(file):
        if application.name in earlier:
            what = f"application `{application.name}` is also in {earlier[application.name]}"
            yield Fault((*path, "name"), what, "apply one of the two, or rename one")
