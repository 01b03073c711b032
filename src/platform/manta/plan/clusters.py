"""A Ray cluster YAML as the autoscaler sees it: node types with resources, market, machine."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from manta.errors import Finding, InvalidSpec
from manta.spec.catalog import CLOUD_OF_PROVIDER, Catalog, InstanceType
from manta.spec.loading import Document, read

Market = Literal["on-demand", "spot", "owned"]
MEMORY_FOR_TASKS = 0.7
"""Share of a node's memory that Ray offers to tasks; the object store has the rest."""
LOCAL_NODE = "local.cluster.node"
"""Ray's name for the one node type of an on-premise cluster."""


@dataclass(frozen=True, kw_only=True)
class NodeType:
    """One entry of `available_node_types`, defaults filled in as Ray fills them."""

    name: str
    resources: Mapping[str, float]
    min_workers: int = 0
    max_workers: int = 0
    labels: Mapping[str, str] = field(default_factory=dict)
    priority: int = 0
    instance_type: str | None = None
    market: Market = "on-demand"
    attached: tuple[tuple[str, int], ...] = ()
    """GPUs that GCP attaches and bills apart: (accelerator, count)."""
    line: int | None = None
    autodetected: bool = False
    """The YAML leaves resources out and the catalogue filled them in."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What a plan needs of a cluster YAML."""

    file: str
    name: str
    provider: str
    cloud: str | None
    """Cloud of the catalogue; None for a provider that it does not know."""
    region: str | None
    node_types: tuple[NodeType, ...]
    head: str
    max_workers: int
    notes: tuple[str, ...] = ()

    def node_type(self, name: str) -> NodeType:
        """The node type of this name; it must exist."""
        return next(node_type for node_type in self.node_types if node_type.name == name)


def read_cluster(file: str | Path, catalog: Catalog) -> Cluster:
    """Read a Ray cluster YAML for planning.

    Raises:
        InvalidSpec: the parts that a plan needs are missing or of the wrong type.
    """
    document = read(file)
    value = document.value
    provider = _mapping(document, value, ("provider",))
    kind = str(provider.get("type", ""))
    if kind == "local":
        return _on_premise(document, provider, catalog)
    cloud = CLOUD_OF_PROVIDER.get(kind)
    types = _mapping(document, value, ("available_node_types",))
    if not types:
        raise _fault(document, ("available_node_types",), "no node types", "add at least a head")
    max_workers = _count(document, ("max_workers",), value.get("max_workers", 2))
    names = list(types)
    head = str(value.get("head_node_type") or names[0]) if len(names) == 1 else None
    head = head or str(value.get("head_node_type", ""))
    if head not in types:
        raise _fault(
            document,
            ("head_node_type",),
            f"head_node_type {head!r} is not one of {', '.join(names)}",
            f"write head_node_type: {names[0]}",
        )
    nodes = tuple(_node_type(document, name, head, max_workers, cloud, catalog) for name in names)
    return Cluster(
        file=str(file),
        name=str(value.get("cluster_name", Path(file).stem)),
        provider=kind,
        cloud=cloud,
        region=_region(provider),
        node_types=nodes,
        head=head,
        max_workers=max_workers,
        notes=_notes(nodes),
    )


def _node_type(
    document: Document,
    name: str,
    head: str,
    cluster_max: int,
    cloud: str | None,
    catalog: Catalog,
) -> NodeType:
    path = ("available_node_types", name)
    entry = _mapping(document, document.value["available_node_types"], (name,), path)
    node_config = _mapping(document, entry, ("node_config",), (*path, "node_config"))
    instance_type = _instance_type_name(cloud, node_config)
    machine = catalog.find(cloud, instance_type) if cloud and instance_type else None
    attached = _attached(node_config) if cloud == "gcp" else ()
    given = _mapping(document, entry, ("resources",), (*path, "resources"))
    resources = {
        key: _number(document, (*path, "resources", key), quantity)
        for key, quantity in given.items()
    }
    detected = _detected(cloud, machine, node_config, is_head=name == head)
    guessed = not given and cloud != "aws" and not node_config.get("acceleratorType")
    if guessed:
        detected = _guessed(machine, attached, catalog)
    smallest = _count(document, (*path, "min_workers"), entry.get("min_workers", 0))
    default_max = 0 if name == head else cluster_max
    largest = _count(document, (*path, "max_workers"), entry.get("max_workers", default_max))
    if smallest > largest:
        raise _fault(
            document,
            (*path, "min_workers"),
            f"min_workers {smallest} is over max_workers {largest}",
            f"write max_workers: {smallest} or fewer min_workers",
        )
    return NodeType(
        name=name,
        resources={**detected, **resources},
        min_workers=smallest,
        max_workers=largest,
        labels={k: str(v) for k, v in (entry.get("labels") or {}).items()},
        priority=_integer(document, (*path, "priority"), entry.get("priority", 0)),
        instance_type=instance_type,
        market=_market(cloud, node_config),
        attached=attached,
        line=document.line(path),
        autodetected=bool(detected) and not given,
    )


def _detected(
    cloud: str | None, machine: InstanceType | None, node_config: Any, *, is_head: bool
) -> dict[str, float]:
    """What Ray adds by itself, under what the YAML gives.

    Ray fills CPU, memory (workers), GPU and accelerator_type on AWS, the slice's head resource for
    TPUs on GCP, and nothing on Azure (`fillout_available_node_types_resources` of each provider).
    """
    if cloud == "gcp" and node_config.get("acceleratorType"):
        return {f"TPU-{node_config['acceleratorType']}-head": 1.0}
    if cloud != "aws" or machine is None:
        return {}
    resources = {"CPU": machine.num_cpus}
    if not is_head:
        resources["memory"] = float(int(machine.memory_bytes * MEMORY_FOR_TASKS))
    if machine.num_gpus:
        resources["GPU"] = float(machine.num_gpus)
        if machine.accelerator:
            resources[f"accelerator_type:{machine.accelerator}"] = 1.0
    return resources


def _guessed(
    machine: InstanceType | None, attached: tuple[tuple[str, int], ...], catalog: Catalog
) -> dict[str, float]:
    """Sizes from the catalogue for clouds where Ray needs them written: the plan says so."""
    if machine is None:
        return {}
    gpus = machine.num_gpus + sum(count for _, count in attached)
    resources = {"CPU": machine.num_cpus, "GPU": float(gpus), "TPU": float(machine.num_tpus)}
    return {name: quantity for name, quantity in resources.items() if quantity}


def _notes(nodes: tuple[NodeType, ...]) -> tuple[str, ...]:
    return tuple(
        f"{node.name}: the YAML gives no resources; taken from the machine's size"
        for node in nodes
        if node.autodetected
    )


def _on_premise(document: Document, provider: Mapping[str, Any], catalog: Catalog) -> Cluster:
    """Machines named by address; what they hold is known only if a price file says so."""
    ips = provider.get("worker_ips") or ()
    value = document.value
    num_ips = len(ips) if isinstance(ips, list) else 0
    cap = num_ips if ips else 10**6  # a coordinator hands out machines: max_workers bounds it
    largest = min(_count(document, ("max_workers",), value.get("max_workers", num_ips)), cap)
    default_min = num_ips if ips else 0
    smallest = min(_count(document, ("min_workers",), value.get("min_workers", default_min)), cap)
    kinds = {name: catalog.find("onprem", name) for name in ("head", "worker")}
    idle_head = "--num-cpus=0" in " ".join(map(str, value.get("head_start_ray_commands") or ()))
    nodes = tuple(
        NodeType(
            name=LOCAL_NODE if kind == "worker" else "head",
            resources=_owned_resources(machine, without_cpus=kind == "head" and idle_head),
            min_workers=smallest if kind == "worker" else 0,
            max_workers=largest if kind == "worker" else 0,
            instance_type=kind,
            market="owned",
            line=document.line(("provider",)),
        )
        for kind, machine in kinds.items()
    )
    notes: tuple[str, ...] = ()
    if kinds["worker"] is None:
        notes = (
            "an on-premise YAML does not say what its machines hold; give a file with "
            "`cloud: onprem` and instance types `head` and `worker` (see "
            "cluster/prices/onprem-example.yaml): --prices FILE",
        )
    return Cluster(
        file=document.file,
        name=str(value.get("cluster_name", Path(document.file).stem)),
        provider="local",
        cloud="onprem",
        region="site",
        node_types=nodes,
        head="head",
        max_workers=largest,
        notes=notes,
    )


def _owned_resources(machine: InstanceType | None, *, without_cpus: bool) -> dict[str, float]:
    if machine is None:
        return {"CPU": 0.0} if without_cpus else {}
    resources = {
        "CPU": machine.num_cpus,
        "GPU": float(machine.num_gpus),
        "memory": machine.memory_bytes * MEMORY_FOR_TASKS,
    }
    if machine.num_gpus and machine.accelerator:
        resources[f"accelerator_type:{machine.accelerator}"] = 1.0
    resources = {name: quantity for name, quantity in resources.items() if quantity}
    return {**resources, "CPU": 0.0} if without_cpus else resources


def _instance_type_name(cloud: str | None, node_config: Mapping[str, Any]) -> str | None:
    if cloud == "aws":
        name = node_config.get("InstanceType")
    elif cloud == "gcp":
        name = node_config.get("acceleratorType") or node_config.get("machineType")
    elif cloud == "azure":
        name = (node_config.get("azure_arm_parameters") or {}).get("vmSize")
    else:
        name = None
    return str(name).rpartition("/")[2] if name else None


def _attached(node_config: Mapping[str, Any]) -> tuple[tuple[str, int], ...]:
    """GCP's guestAccelerators, whose type may be a full URL."""
    given = node_config.get("guestAccelerators") or ()
    return tuple(
        (str(gpu.get("acceleratorType", "")).rpartition("/")[2], int(gpu["acceleratorCount"]))
        for gpu in given
        if isinstance(gpu, dict) and str(gpu.get("acceleratorCount", "")).isdigit()
    )


def _market(cloud: str | None, node_config: Mapping[str, Any]) -> Market:
    if cloud == "aws":
        options = node_config.get("InstanceMarketOptions") or {}
        return "spot" if options.get("MarketType") == "spot" else "on-demand"
    if cloud == "gcp":
        scheduling = node_config.get("scheduling") or node_config.get("schedulingConfig") or {}
        if isinstance(scheduling, list):  # `scheduling: [{preemptible: true}]` is accepted too
            scheduling = {k: v for item in scheduling for k, v in item.items()}
        spot = scheduling.get("preemptible") or scheduling.get("provisioningModel") == "SPOT"
        return "spot" if spot or scheduling.get("spot") else "on-demand"
    if cloud == "azure":
        parameters = node_config.get("azure_arm_parameters") or {}
        return "spot" if str(parameters.get("priority", "")).lower() == "spot" else "on-demand"
    return "on-demand"


def _region(provider: Mapping[str, Any]) -> str | None:
    region = provider.get("region") or provider.get("location")
    zone = str(provider.get("availability_zone") or "").split(",")[0]
    if not region and zone:
        region = re.sub(r"(?:-[a-z]|(?<=\d)[a-z])$", "", zone)
    return str(region) if region else None


def _mapping(
    document: Document,
    parent: Mapping[str, Any],
    keys: tuple[str, ...],
    path: tuple[str | int, ...] = (),
) -> dict[str, Any]:
    value = parent.get(keys[-1])
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _fault(document, path or keys, f"`{keys[-1]}` must be a mapping", "write key: value")
    return value


def _number(document: Document, path: tuple[str | int, ...], value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e18:
        raise _fault(document, path, f"`{path[-1]}` is {value!r}", "write a number, 0 or more")
    return float(value)


def _integer(document: Document, path: tuple[str | int, ...], value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise _fault(document, path, f"`{path[-1]}` is {value!r}", "write a whole number")
    return value


def _count(document: Document, path: tuple[str | int, ...], value: object) -> int:
    number = _integer(document, path, value)
    if not 0 <= number <= 10**6:
        raise _fault(document, path, f"`{path[-1]}` is {value!r}", "write 0 to 1,000,000")
    return number


def _fault(
    document: Document, path: tuple[str | int, ...], what: str, fix: str = ""
) -> InvalidSpec:
    return InvalidSpec(
        [Finding(file=document.file, line=document.line(path), what=what, fix=fix, rule="cluster")]
    )
