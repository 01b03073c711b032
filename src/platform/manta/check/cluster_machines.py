"""Rules over cluster YAMLs: regions, machine types, and what node configs ask the provider for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from manta.check.cluster_shape import CLOUDS, spec
from manta.check.facts import azure, ec2, gce, ray
from manta.check.rules import (
    Fault,
    File,
    Project,
    did_you_mean,
    misspelt_keys,
    nearest,
    rule,
    unknown_keys,
)
from manta.spec.catalog import InstanceType
from manta.spec.cluster import ClusterSpec, NodeType
from manta.spec.loading import Path_

_EC2_KEYS = {**ec2.RUN_INSTANCES_KEYS, "": ec2.RUN_INSTANCES_KEYS[""] | {"SubnetIds"}}
_AZURE_KEYS = {"": azure.NODE_CONFIG_KEYS, "azure_arm_parameters": azure.ARM_PARAMETERS}
NODE_CONFIG_KEYS = {"aws": _EC2_KEYS, "gcp": gce.INSTANCE_KEYS, "azure": _AZURE_KEYS}
"""Provider → keys of `node_config` by dotted path."""

_REGION_KEY = {"aws": "region", "gcp": "region", "azure": "location"}
_REGIONS = {"aws": ec2.REGIONS, "gcp": gce.REGIONS, "azure": azure.LOCATIONS}


def node_path(name: str, *more: str | int) -> Path_:
    """Where something of a node type stands in the file."""
    return ("available_node_types", name, *more)


def machine_of(cluster: ClusterSpec, node_type: NodeType) -> tuple[str, Path_]:
    """Machine type name ("" if none is given), and its path below the node type."""
    """What the catalogue knows of the node type's machine, if it lists it."""
    config = node_type.node_config_passthrough
    if cluster.provider.type == "azure":
        arm = config.get("azure_arm_parameters")
        size = arm.get("vmSize") if isinstance(arm, dict) else None
        return str(size or ""), ("node_config", "azure_arm_parameters", "vmSize")
    key = {"aws": "InstanceType", "gcp": "machineType"}.get(cluster.provider.type, "")
    return str(config.get(key) or ""), ("node_config", key)


def instance_type(
    cluster: ClusterSpec, node_type: NodeType, project: Project
) -> InstanceType | None:
    """What the catalogue knows of the node type's machine, if it lists it."""
    name, _ = machine_of(cluster, node_type)
    return project.catalog.find(cluster.provider.type, name.rsplit("/", 1)[-1])


@rule("provider-misspelt-key", "error", "cluster")
def provider_misspelt_key(file: File, project: Project) -> Iterable[Fault]:
    """Ray lets any provider key pass; a misspelt one is silently without effect."""
    known = {"": ray.PROVIDER_KEYS.get(spec(file).provider.type, frozenset())}
    return misspelt_keys(file.value["provider"], ("provider",), known)


@rule("node-config-misspelt-key", "error", "cluster")
def node_config_misspelt(file: File, project: Project) -> Iterator[Fault]:
    """Ray passes node_config on unread; the cloud refuses the launch, or ignores the key."""
    cluster = spec(file)
    known = NODE_CONFIG_KEYS.get(cluster.provider.type, {})
    for name, node_type in cluster.node_types.items():
        path = node_path(name, "node_config")
        yield from misspelt_keys(node_type.node_config_passthrough, path, known)


@rule("node-config-unusual-key", "warning", "cluster")
def node_config_unusual(file: File, project: Project) -> Iterator[Fault]:
    """The provider's launch request has no such key that is known here."""
    cluster = spec(file)
    known = NODE_CONFIG_KEYS.get(cluster.provider.type, {})
    for name, node_type in cluster.node_types.items():
        path = node_path(name, "node_config")
        yield from unknown_keys(node_type.node_config_passthrough, path, known)


@rule("cluster-region", "error", "cluster")
def region(file: File, project: Project) -> Iterator[Fault]:
    """The cloud has no such region; Ray finds out after it has asked for your credentials."""
    cluster = spec(file)
    cloud = cluster.provider.type
    if cloud not in CLOUDS:
        return
    name = getattr(cluster.provider, _REGION_KEY[cloud])
    folded = name.replace(" ", "").lower() if name and cloud == "azure" else name
    known = _REGIONS[cloud] | set(project.catalog.regions(cloud))
    if folded and folded not in known:
        fix = did_you_mean(folded, known) or f"e.g. {sorted(known)[-1]}"
        yield Fault(("provider", _REGION_KEY[cloud]), f"{cloud} has no region `{name}`", fix)


@rule("cluster-zone", "error", "cluster")
def zone(file: File, project: Project) -> Iterator[Fault]:
    """A zone of another region: no subnet or machine will be found there."""
    provider = spec(file).provider
    if provider.type not in ("aws", "gcp") or not (provider.region and provider.availability_zone):
        return
    for name in re.split(r"[,\s]+", provider.availability_zone.strip()):
        if not re.fullmatch(rf"{re.escape(provider.region)}(-?[a-z]|-[a-z0-9-]+)", name):
            what = f"zone `{name}` is not in region {provider.region}"
            fix = f"e.g. {provider.region}{'-a' if provider.type == 'gcp' else 'a'}"
            yield Fault(("provider", "availability_zone"), what, fix)


@rule("cluster-machine-missing", "error", "cluster")
def machine_missing(file: File, project: Project) -> Iterator[Fault]:
    """A node type must say which machine it is."""
    cluster = spec(file)
    for name, node_type in cluster.node_types.items():
        config = node_type.node_config_passthrough
        elsewhere = {
            "LaunchTemplate",
            "acceleratorType",
            "acceleratorConfig",
            "sourceMachineImage",
        }
        if cluster.provider.type not in CLOUDS or elsewhere & config.keys():
            continue
        machine, path = machine_of(cluster, node_type)
        if not machine:
            what = f"`{name}` names no machine type"
            yield Fault(node_path(name, "node_config"), what, f"add `{path[-1]}: …`")


@rule("cluster-machine-unknown", "error", "cluster")
def machine_unknown(file: File, project: Project) -> Iterator[Fault]:
    """The cloud has no such machine type; each launch fails after `ray up` has started."""
    cluster = spec(file)
    cloud = cluster.provider.type
    for name, node_type in cluster.node_types.items():
        machine, path = machine_of(cluster, node_type)
        if not machine or cloud not in CLOUDS or instance_type(cluster, node_type, project):
            continue
        if _is_wrong(cloud, machine):
            known = {*ec2.INSTANCE_TYPES} if cloud == "aws" else {*project.catalog.names(cloud)}
            what = f"{cloud} has no machine type `{machine}`"
            yield Fault(node_path(name, *path), what, did_you_mean(machine, known))


def _is_wrong(cloud: str, machine: str) -> bool:
    if cloud == "gcp":
        return not gce.is_machine_type(machine.rsplit("/", 1)[-1])
    if cloud == "azure":
        return not azure.is_vm_size(machine)
    return machine not in ec2.INSTANCE_TYPES and not _may_be_new(machine)


def _may_be_new(machine: str) -> bool:
    """An EC2 family younger than our list: unlike any listed one, of a size that exists."""
    family, _, size = machine.partition(".")
    families = {name.partition(".")[0] for name in ec2.INSTANCE_TYPES}
    sizes = {name.partition(".")[2] for name in ec2.INSTANCE_TYPES}
    plausible = re.fullmatch(r"[a-z]{1,4}\d{1,2}[a-z]{0,6}(-[a-z0-9]+)?", family) is not None
    return plausible and size in sizes and nearest(family, families) is None


@rule("cluster-machine-new", "warning", "cluster")
def machine_new(file: File, project: Project) -> Iterator[Fault]:
    """Not in the list of machine types known here: new, or misspelt."""
    cluster = spec(file)
    for name, node_type in cluster.node_types.items():
        machine, path = machine_of(cluster, node_type)
        if cluster.provider.type != "aws" or not machine or machine in ec2.INSTANCE_TYPES:
            continue
        if _may_be_new(machine) and not instance_type(cluster, node_type, project):
            yield Fault(("available_node_types", name, *path), f"`{machine}` is not known here")


@rule("cluster-gpus-not-there", "error", "cluster")
def gpus_not_there(file: File, project: Project) -> Iterator[Fault]:
    """Tasks that were promised a GPU which the machine lacks fail, or share one unawares."""
    cluster = spec(file)
    for name, node_type in cluster.node_types.items():
        declared = node_type.resources.get("GPU", 0)
        present = num_gpus(cluster, node_type, project)
        if present is not None and declared > present:
            machine, _ = machine_of(cluster, node_type)
            what = f"`{name}` declares {declared} GPU, a {machine} has {present}"
            fix = "write what it has" if present else "choose a machine type with GPUs"
            yield Fault(node_path(name, "resources", "GPU"), what, fix)


def num_gpus(cluster: ClusterSpec, node_type: NodeType, project: Project) -> int | None:
    """GPUs of a node; None where nothing tells."""
    known = instance_type(cluster, node_type, project)
    machine, _ = machine_of(cluster, node_type)
    if cluster.provider.type == "gcp":
        attached = _attached_gpus(node_type.node_config_passthrough.get("guestAccelerators"))
        builtin = known.num_gpus if known else (None if machine.startswith(("a", "g")) else 0)
        return None if builtin is None or attached is None else max(builtin, attached)
    if known:
        return known.num_gpus
    if cluster.provider.type == "aws" and machine in ec2.INSTANCE_TYPES:
        return None if machine.startswith(("p", "g", "inf", "trn", "dl", "vt", "f")) else 0
    return None


def _attached_gpus(accelerators: Any) -> int | None:
    if not accelerators:
        return 0
    try:
        return sum(int(accelerator["acceleratorCount"]) for accelerator in accelerators)
    except (KeyError, TypeError, ValueError):
        return None


@rule("cluster-overcommitted", "warning", "cluster")
def overcommitted(file: File, project: Project) -> Iterator[Fault]:
    """More CPUs or memory declared than the machine has: work is packed on until it stalls."""
    cluster = spec(file)
    for name, node_type in cluster.node_types.items():
        machine, _ = machine_of(cluster, node_type)
        known = instance_type(cluster, node_type, project)
        cpus = known.num_cpus if known else None
        if cpus is None and cluster.provider.type == "gcp":
            cpus = gce.num_cpus(machine.rsplit("/", 1)[-1])
        has = {"CPU": cpus, "memory": known.memory_bytes if known else None}
        for resource, amount in has.items():
            declared = node_type.resources.get(resource, 0)
            if amount is not None and declared > amount:
                what = f"`{name}` declares {resource} {declared:,}, a {machine} has {amount:,.0f}"
                yield Fault(node_path(name, "resources", resource), what, "write what it has")


@rule("cluster-interfaces-conflict", "error", "cluster")
def interfaces_conflict(file: File, project: Project) -> Iterator[Fault]:
    """Ray refuses subnets or groups beside NetworkInterfaces, and interfaces without them."""
    cluster = spec(file)
    if cluster.provider.type != "aws":
        return
    for name, node_type in cluster.node_types.items():
        config = node_type.node_config_passthrough
        interfaces = config.get("NetworkInterfaces")
        if not isinstance(interfaces, list):
            continue
        for key in ("SubnetId", "SubnetIds", "SecurityGroupIds"):
            if key in config:
                what = f"`{key}` stands beside NetworkInterfaces"
                yield Fault(node_path(name, "node_config", key), what, "give it per interface")
        for i, interface in enumerate(interfaces):
            missing = [k for k in ("SubnetId", "Groups") if k not in interface]
            if missing:
                path = (*node_path(name, "node_config", "NetworkInterfaces"), i)
                yield Fault(path, f"interface has no `{missing[0]}`", f"add `{missing[0]}: …`")


@rule("cluster-tpu-config", "error", "cluster")
def tpu_config(file: File, project: Project) -> Iterator[Fault]:
    """Ray refuses such a TPU node type when it reads the file."""
    cluster = spec(file)
    if cluster.provider.type != "gcp":
        return
    for name, node_type in cluster.node_types.items():
        config = node_type.node_config_passthrough
        if "machineType" in config or not config.keys() & {"acceleratorType", "acceleratorConfig"}:
            continue
        path = node_path(name, "node_config")
        if name == cluster.head_node_type:
            yield Fault(path, "the head cannot be a TPU", "give the head a machineType")
        if "acceleratorType" in config and "acceleratorConfig" in config:
            yield Fault(path, "acceleratorType beside acceleratorConfig", "keep one")
        kind = config.get("acceleratorType")
        if kind is not None and not re.fullmatch(r"(v\d+[a-zA-Z]*|tpu\d+x?)-\d+", str(kind)):
            what = f"acceleratorType `{kind}` is not GENERATION-CORES"
            yield Fault((*path, "acceleratorType"), what, "e.g. v5litepod-8")
        if "runtimeVersion" not in config:
            yield Fault(path, f"`{name}` has no runtimeVersion", "add `runtimeVersion: …`")
