"""KubeRay manifests from a Ray cluster YAML, and the list of what has no counterpart there.

Fields as in KubeRay's `ray.io/v1` CRDs (RayCluster, RayJob, RayService).
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from manta.plan.clusters import Cluster, NodeType
from manta.plan.ray_scheduler import RAY_VERSION
from manta.spec import JobSpec
from manta.spec.catalog import GIB, Catalog
from manta.spec.loading import read

SHARE_OF_MACHINE = 0.85
"""Of a machine's CPU and memory, what a pod asks for: the kubelet and daemons have the rest."""

_SPOT: Mapping[str, dict[str, str]] = {
    "aws": {"eks.amazonaws.com/capacityType": "SPOT"},
    "gcp": {"cloud.google.com/gke-spot": "true"},
    "azure": {"kubernetes.azure.com/scalesetpriority": "spot"},
}
_CARRIED = {
    "cluster_name", "max_workers", "min_workers", "idle_timeout_minutes", "provider", "docker",
    "available_node_types", "head_node_type",
}  # fmt: skip
_CARRIED_OF_TYPE = {
    "resources", "node_config", "min_workers", "max_workers", "priority", "labels", "docker",
}  # fmt: skip
_WHY = {
    "auth": "pods are not reached by SSH",
    "file_mounts": "use the image, a ConfigMap or a Secret; KubeRay ships the token itself",
    "initialization_commands": "prepare Kubernetes nodes with a DaemonSet or a machine image",
    "setup_commands": "build them into the image",
    "head_setup_commands": "build them into the image",
    "worker_setup_commands": "build them into the image",
    "head_start_ray_commands": "KubeRay writes `ray start` from rayStartParams",
    "worker_start_ray_commands": "KubeRay writes `ray start` from rayStartParams",
    "upscaling_speed": "the nearest is autoscalerOptions.upscalingMode; set it by hand",
}


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """A manifest and what could not be carried over."""

    manifest_passthrough: Mapping[str, Any]
    """KubeRay's own keys."""
    missing: tuple[str, ...]
    """Key of the cluster YAML, and what to do instead."""

    def to_yaml(self) -> str:
        """The manifest, headed by the list as a comment."""
        lines = ["# Rendered by `manta render kuberay`. Without a counterpart in KubeRay:"]
        lines += [f"# - {item}" for item in self.missing]
        body = yaml.safe_dump(dict(self.manifest_passthrough), sort_keys=False, width=99)
        return "\n".join(lines) + "\n" + body


def render_cluster(cluster: Cluster, catalog: Catalog) -> Rendered:
    """A RayCluster."""
    spec, missing = _spec(cluster, catalog)
    return Rendered(
        manifest_passthrough=_manifest("RayCluster", cluster.name, spec), missing=missing
    )


def render_job(cluster: Cluster, catalog: Catalog, job: JobSpec) -> Rendered:
    """A RayJob that starts the cluster, runs the job and takes the cluster down."""
    spec, missing = _spec(cluster, catalog)
    entrypoint = f"{job.entrypoint} --config {job.config}" if job.config else job.entrypoint
    runtime_env = {
        **job.runtime_env_passthrough,
        "env_vars": {**job.runtime_env_passthrough.get("env_vars", {}), **job.environment},
    }
    asked = job.resources
    body = {
        "entrypoint": entrypoint,
        "runtimeEnvYAML": yaml.safe_dump(runtime_env, sort_keys=True),
        "entrypointNumCpus": asked.num_cpus or None,
        "entrypointNumGpus": asked.num_gpus or None,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": 600,
        "rayClusterSpec": spec,
    }
    body = {key: value for key, value in body.items() if value is not None}
    local = "the working directory: give runtime_env.working_dir a URL, or build it into the image"
    return Rendered(
        manifest_passthrough=_manifest("RayJob", job.name, body), missing=(*missing, local)
    )


def render_service(cluster: Cluster, catalog: Catalog, app: str | Path) -> Rendered:
    """A RayService that serves the applications of a Serve config."""
    spec, missing = _spec(cluster, catalog)
    config = read(app).value
    options = [key for key in ("http_options", "proxy_location", "grpc_options") if key in config]
    lost = tuple(f"{app}: {key}: KubeRay sets it" for key in options)
    served = {key: value for key, value in config.items() if key not in options}
    text = yaml.safe_dump(served, sort_keys=False)
    body = {"serveConfigV2": text, "rayClusterConfig": spec}
    manifest = _manifest("RayService", Path(app).stem, body)
    return Rendered(manifest_passthrough=manifest, missing=(*missing, *lost))


def _manifest(kind: str, name: str, spec: Mapping[str, Any]) -> dict[str, Any]:
    clean = re.sub(r"[^a-z0-9-]+", "-", name.lower()).strip("-")[:47] or "ray"
    return {
        "apiVersion": "ray.io/v1",
        "kind": kind,
        "metadata": {"name": clean},
        "spec": dict(spec),
    }


def _spec(cluster: Cluster, catalog: Catalog) -> tuple[dict[str, Any], tuple[str, ...]]:
    document = read(cluster.file).value
    head = cluster.node_type(cluster.head)
    workers = [node for node in cluster.node_types if node.max_workers or node is not head]
    spec: dict[str, Any] = {
        "rayVersion": RAY_VERSION,
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": _autoscaler(document),
        "authOptions": {"mode": "token"},  # KubeRay makes the token and gives it to every pod
        "headGroupSpec": {
            "rayStartParams": {**_start(head), "dashboard-host": "0.0.0.0"},
            "template": _pod(head, cluster, catalog, document, is_head=True),
        },
        "workerGroupSpecs": [_group(node, cluster, catalog, document) for node in workers],
    }
    return spec, tuple(_missing(cluster, document))


def _autoscaler(document: Mapping[str, Any]) -> dict[str, Any]:
    options: dict[str, Any] = {"version": "v2"}
    if "idle_timeout_minutes" in document:
        options["idleTimeoutSeconds"] = int(document["idle_timeout_minutes"] * 60)
    return options


def _group(
    node: NodeType, cluster: Cluster, catalog: Catalog, document: Mapping[str, Any]
) -> dict[str, Any]:
    group: dict[str, Any] = {
        "groupName": re.sub(r"[^a-z0-9-]+", "-", node.name.lower()).strip("-"),
        "replicas": node.min_workers,
        "minReplicas": node.min_workers,
        "maxReplicas": max(node.max_workers, 1),
        "rayStartParams": _start(node),
        "template": _pod(node, cluster, catalog, document, is_head=False),
    }
    if node.priority:
        group["priority"] = node.priority
    if node.labels:
        group["labels"] = dict(node.labels)
    return group


def _start(node: NodeType) -> dict[str, str]:
    params = {}
    if "CPU" in node.resources:
        params["num-cpus"] = f"{node.resources['CPU']:g}"
    if node.resources.get("GPU"):
        params["num-gpus"] = f"{node.resources['GPU']:g}"
    if custom := _custom(node):
        # A word for a shell, which Ray's autoscaler for Kubernetes reads as well.
        text = json.dumps({name: custom[name] for name in sorted(custom)}).replace('"', '\\"')
        params["resources"] = f'"{text}"'
    return params


def _custom(node: NodeType) -> dict[str, int]:
    """Resources that `ray start` has no option for; Ray gives TPU nodes their own.

    Whole ones: Ray's autoscaler for Kubernetes reads no others.
    """
    known = ("CPU", "GPU", "memory", "object_store_memory")
    return {
        name: int(number)
        for name, number in node.resources.items()
        if name not in known and not name.startswith("TPU") and float(number).is_integer()
    }


def _pod(
    node: NodeType,
    cluster: Cluster,
    catalog: Catalog,
    document: Mapping[str, Any],
    *,
    is_head: bool,
) -> dict[str, Any]:
    container: dict[str, Any] = {
        "name": "ray-head" if is_head else "ray-worker",
        "image": _image(node, document, is_head=is_head),
    }
    env = dict(_environment(node, document))
    if env:
        container["env"] = [{"name": key, "value": value} for key, value in env.items()]
    limits = _limits(node, cluster, catalog)
    if limits:
        container["resources"] = {"limits": limits, "requests": limits}
    spec: dict[str, Any] = {"containers": [container]}
    selector, tolerations = _placement(node, cluster)
    if selector:
        spec["nodeSelector"] = selector
    if tolerations:
        spec["tolerations"] = tolerations
    return {"spec": spec}


def _image(node: NodeType, document: Mapping[str, Any], *, is_head: bool) -> str:
    docker = {**(document.get("docker") or {}), **_own_docker(node, document)}
    image = docker.get("head_image" if is_head else "worker_image") or docker.get("image")
    suffix = "-gpu" if node.resources.get("GPU") else ""
    return str(image or f"rayproject/ray:{RAY_VERSION}-py311{suffix}")


def _own_docker(node: NodeType, document: Mapping[str, Any]) -> dict[str, Any]:
    entry = (document.get("available_node_types") or {}).get(node.name) or {}
    return dict(entry.get("docker") or {})


def _options(node: NodeType, document: Mapping[str, Any]) -> list[str]:
    shared = document.get("docker") or {}
    kinds = ("run_options", "head_run_options", "worker_run_options")
    return [
        str(option)
        for docker in (shared, _own_docker(node, document))
        for kind in kinds
        for option in docker.get(kind) or ()
    ]


def _environment(node: NodeType, document: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """`--env=NAME=VALUE` and `-e NAME=VALUE` of docker's run options; the token's is KubeRay's."""
    for option in _options(node, document):
        name, _, value = _env_of(option).partition("=")
        if name and name != "RAY_AUTH_MODE":
            yield name, value


def _env_of(option: str) -> str:
    words = shlex.split(option)
    if words and words[0].startswith("--env="):
        return words[0].removeprefix("--env=")
    return words[1] if len(words) == 2 and words[0] in ("-e", "--env") else ""


def _limits(node: NodeType, cluster: Cluster, catalog: Catalog) -> dict[str, str]:
    machine = catalog.find(cluster.cloud or "", node.instance_type or "")
    limits = {}
    if machine:
        limits["cpu"] = str(max(1, int(machine.num_cpus * SHARE_OF_MACHINE)))
        limits["memory"] = f"{int(machine.memory_bytes / GIB * SHARE_OF_MACHINE)}Gi"
    if node.resources.get("GPU"):
        limits["nvidia.com/gpu"] = f"{node.resources['GPU']:g}"
    if node.resources.get("TPU"):
        limits["google.com/tpu"] = f"{node.resources['TPU']:g}"
    return limits


def _placement(node: NodeType, cluster: Cluster) -> tuple[dict[str, str], list[dict[str, str]]]:
    selector: dict[str, str] = {}
    is_slice = bool(node.resources.get("TPU"))  # GKE names TPU machines otherwise
    if node.instance_type and cluster.cloud in _SPOT and not is_slice:
        selector["node.kubernetes.io/instance-type"] = node.instance_type
    tolerations = []
    if node.market == "spot":
        spot = _SPOT.get(cluster.cloud or "", {})
        selector.update(spot)
        tolerations += [
            {"key": key, "operator": "Equal", "value": value, "effect": "NoSchedule"}
            for key, value in spot.items()
        ]
    if node.resources.get("GPU"):
        tolerations.append({"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"})
    return selector, tolerations


def _missing(cluster: Cluster, document: Mapping[str, Any]) -> Iterator[str]:
    for key in document:
        if key not in _CARRIED:
            yield f"{key}: {_WHY.get(key, 'KubeRay has no such key')}"
    yield f"max_workers: {cluster.max_workers} over all groups; KubeRay limits each group alone"
    for key in document.get("provider") or {}:
        if key not in ("type", "region", "location"):
            yield f"provider.{key}: set by the Kubernetes cluster and its node pools"
    yield from _missing_docker(cluster, document)
    for name, entry in (document.get("available_node_types") or {}).items():
        node = cluster.node_type(name)
        if node.resources.get("TPU"):
            yield f"{name}: GKE's TPU node selectors (gke-tpu-accelerator, gke-tpu-topology)"
        carried = {"CPU", "GPU", "TPU", "memory", *_custom(node)}
        for resource in sorted(set((entry or {}).get("resources") or ()) - carried):
            yield f"{name}.resources.{resource}: add it to rayStartParams.resources"
        known = ("InstanceType", "machineType", "InstanceMarketOptions", "scheduling")
        keys = [k for k in (entry or {}).get("node_config") or {} if k not in known]
        if keys:
            yield f"{name}.node_config.{{{', '.join(keys)}}}: belongs to the node pool"
        lost = set(entry or {}) - _CARRIED_OF_TYPE
        for key in sorted(lost):
            yield f"{name}.{key}: {_WHY.get(key, 'KubeRay has no such key')}"


def _missing_docker(cluster: Cluster, document: Mapping[str, Any]) -> Iterator[str]:
    docker = document.get("docker") or {}
    for key in docker:
        if not key.endswith(("image", "run_options")):
            yield f"docker.{key}: KubeRay names and pulls by the pod's own rules"
    seen = dict.fromkeys(
        option
        for node in cluster.node_types
        for option in _options(node, document)
        if not _env_of(option)
    )
    for option in seen:
        yield f"docker run option `{option}`: use securityContext, volumes, device plugins"
