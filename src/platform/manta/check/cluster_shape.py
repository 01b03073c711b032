"""Rules over cluster YAMLs: keys, counts, node types, the head, start commands."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from manta.check.facts import ray
from manta.check.rules import Fault, File, Project, did_you_mean, nearest, rule, unknown_keys
from manta.spec.cluster import ClusterSpec, NodeType

CLOUDS = ("aws", "gcp", "azure")
FINDS_RESOURCES = ("aws", "aliyun", "vsphere", "spark")
"""Providers that fill in a node type's resources from its machine type."""


def spec(file: File) -> ClusterSpec:
    """The typed spec; rules run only on files that have one."""
    assert isinstance(file.spec, ClusterSpec)
    return file.spec


@rule("cluster-provider-type", "error", "cluster")
def provider_type(file: File, project: Project) -> Iterator[Fault]:
    """Ray has a fixed list of providers; any other ends `ray up` with a traceback."""
    provider = spec(file).provider
    if provider.type not in ray.PROVIDERS:
        fix = did_you_mean(provider.type, ray.PROVIDERS) or f"one of {', '.join(ray.PROVIDERS)}"
        yield Fault(("provider", "type"), f"no provider is named `{provider.type}`", fix)
    if provider.type == "external" and not provider.module:
        yield Fault(("provider",), "an external provider needs `module`", "add `module: …`")


@rule("cluster-provider-incomplete", "error", "cluster")
def provider_incomplete(file: File, project: Project) -> Iterator[Fault]:
    """Without these the provider cannot say where to start machines."""
    provider = file.value["provider"]
    for key in ray.PROVIDER_REQUIRES.get(spec(file).provider.type, ()):
        if key not in provider:
            yield Fault(("provider",), f"provider has no `{key}`", f"add `{key}: …`")


@rule("cluster-placeholder", "warning", "cluster")
def placeholder(file: File, project: Project) -> Iterator[Fault]:
    """`null` stands where Ray needs a value of yours."""
    provider = file.value["provider"]
    for key in ray.PROVIDER_REQUIRES.get(spec(file).provider.type, ()):
        if key in provider and provider[key] is None:
            yield Fault(("provider", key), f"`{key}` is null", "write your own")


@rule("provider-unusual-key", "warning", "cluster")
def provider_unusual_key(file: File, project: Project) -> Iterable[Fault]:
    """Ray lets any provider key pass; one that the provider does not read does nothing."""
    known = {"": ray.PROVIDER_KEYS.get(spec(file).provider.type, frozenset())}
    return unknown_keys(file.value["provider"], ("provider",), known) if known[""] else ()


@rule("cluster-head-type", "error", "cluster")
def head_type(file: File, project: Project) -> Iterator[Fault]:
    """Ray must know which node type is the head; it refuses the file otherwise."""
    cluster = spec(file)
    if not cluster.available_node_types or cluster.provider.type == "local":
        return
    if cluster.head_node_type is None:
        yield Fault(
            ("available_node_types",),
            "`head_node_type` is missing",
            f"add `head_node_type: {next(iter(cluster.node_types))}`",
        )
    elif cluster.head_node_type not in cluster.node_types:
        names = tuple(cluster.node_types)
        fix = did_you_mean(cluster.head_node_type, names) or f"one of {', '.join(names)}"
        what = f"no node type is named `{cluster.head_node_type}`"
        yield Fault(("head_node_type",), what, fix)


@rule("cluster-legacy-field", "error", "cluster")
def legacy_field(file: File, project: Project) -> Iterator[Fault]:
    """Ray 2 has node types; beside them it refuses `head_node` and `worker_nodes`."""
    for key in ("head_node", "worker_nodes"):
        if file.value.get(key) and spec(file).available_node_types:
            fix = "move its keys into `node_config` of each node type"
            yield Fault((key,), f"`{key}` is not taken beside available_node_types", fix)


@rule("cluster-onprem-node-types", "error", "cluster")
def onprem_node_types(file: File, project: Project) -> Iterator[Fault]:
    """On-prem Ray has one node type and aborts if the file declares any."""
    if spec(file).provider.type != "local":
        return
    for key in ("available_node_types", "head_node_type", "head_node", "worker_nodes"):
        if file.value.get(key):
            fix = "remove it; each machine offers the CPUs and GPUs that Ray finds on it"
            yield Fault((key,), f"on-prem clusters take no `{key}`", fix)


@rule("cluster-onprem-addresses", "error", "cluster")
def onprem_addresses(file: File, project: Project) -> Iterator[Fault]:
    """Ray starts on the listed machines; one listed twice or as head and worker runs two nodes."""
    provider = spec(file).provider
    if provider.type != "local" or "coordinator_address" in file.value["provider"]:
        return
    for key in ("head_ip", "worker_ips"):
        if getattr(provider, key) is None:
            fix = f"add `{key}: …`, or `coordinator_address`"
            yield Fault(("provider",), f"provider has no `{key}`", fix)
    seen = {provider.head_ip}
    for i, address in enumerate(provider.worker_ips or ()):
        if address in seen:
            what = f"{address} is listed already" if i else f"{address} is the head"
            yield Fault(("provider", "worker_ips", i), what, "list each machine once")
        seen.add(address)


@rule("cluster-counts", "error", "cluster")
def counts(file: File, project: Project) -> Iterator[Fault]:
    """Counts that contradict each other: Ray refuses them, or keeps fewer nodes than asked."""
    cluster = spec(file)
    for name, node_type in cluster.node_types.items():
        yield from _type_counts(name, node_type)
    limit = 2 if cluster.max_workers is None else cluster.max_workers
    total = sum(node_type.min_workers or 0 for node_type in cluster.node_types.values())
    if total > limit:
        what = f"the node types' min_workers add up to {total}, over max_workers {limit}"
        path = ("max_workers",) if cluster.max_workers is not None else ("available_node_types",)
        yield Fault(path, what, f"write max_workers: {total} or more")
    is_local, low = cluster.provider.type == "local", cluster.min_workers or 0
    if is_local and cluster.max_workers is not None and low > limit:
        yield Fault(("min_workers",), f"{low} is over max_workers {limit}", "make them equal")


def _type_counts(name: str, node_type: NodeType) -> Iterator[Fault]:
    path = ("available_node_types", name)
    low, high = node_type.min_workers or 0, node_type.max_workers
    if low < 0:
        yield Fault((*path, "min_workers"), f"min_workers is {low}", "write 0 or more")
    if high is not None and high < 0:
        yield Fault((*path, "max_workers"), f"max_workers is {high}", "write 0 or more")
    elif high is not None and low > high:
        what = f"min_workers {low} of `{name}` is over its max_workers {high}"
        yield Fault((*path, "min_workers"), what, f"write max_workers: {low} or more")


@rule("cluster-limit-unreachable", "warning", "cluster")
def limit_unreachable(file: File, project: Project) -> Iterator[Fault]:
    """A node type's max_workers over the cluster's can never be reached."""
    cluster = spec(file)
    for name, node_type in cluster.node_types.items():
        limit, high = cluster.max_workers, node_type.max_workers
        if limit is not None and high is not None and 0 < limit < high:
            path = ("available_node_types", name, "max_workers")
            yield Fault(path, f"max_workers {high} is over the cluster's {limit}", "raise that")


@rule("cluster-onprem-counts", "warning", "cluster")
def onprem_counts(file: File, project: Project) -> Iterator[Fault]:
    """Ray cuts the counts to the machines that are listed."""
    cluster = spec(file)
    if cluster.provider.type != "local" or cluster.provider.worker_ips is None:
        return
    num_machines = len(cluster.provider.worker_ips)
    for key in ("min_workers", "max_workers"):
        count = getattr(cluster, key)
        if count is not None and count > num_machines:
            what = f"{key} is {count}, but worker_ips lists {num_machines}"
            yield Fault((key,), what, f"write {num_machines}, or list more machines")


@rule("cluster-type-unreachable", "warning", "cluster")
def type_unreachable(file: File, project: Project) -> Iterator[Fault]:
    """No demand can make the autoscaler start such a node: it may have none, or offers nothing."""
    cluster = spec(file)
    for name, node_type in cluster.node_types.items():
        if name == cluster.head_node_type:
            continue
        path = ("available_node_types", name)
        if cluster.max_workers == 0 or node_type.max_workers == 0:
            key = (*path, "max_workers") if node_type.max_workers == 0 else ("max_workers",)
            fix = "write a max_workers above 0 when you want it"
            yield Fault(key, f"`{name}` can have no node", fix)
        elif not node_type.min_workers and _offers_nothing(cluster, node_type):
            fix = 'declare what a node has, e.g. resources: {"CPU": 16}'
            yield Fault(
                (*path, "resources"), f"`{name}` offers nothing that can be asked for", fix
            )


def _offers_nothing(cluster: ClusterSpec, node_type: NodeType) -> bool:
    if cluster.provider.type in FINDS_RESOURCES and not node_type.resources:
        return False
    is_tpu = {"acceleratorType", "acceleratorConfig"} & node_type.node_config_passthrough.keys()
    return not is_tpu and not any(node_type.resources.values())


@rule("cluster-work-on-head", "warning", "cluster")
def work_on_head(file: File, project: Project) -> Iterator[Fault]:
    """Tasks on the head take memory from the control store; when that dies the cluster does."""
    cluster = spec(file)
    if _start_option(cluster.head_start_ray_commands, "num-cpus") == "0":
        return
    if cluster.provider.type == "local":
        path: tuple[str, ...] = ("head_start_ray_commands",)
        yield Fault(path, "tasks run on the head", "add `--num-cpus=0` to its `ray start`")
        return
    head = cluster.node_types.get(cluster.head_node_type or "")
    if head is None or head.resources.get("CPU") == 0 or cluster.max_workers == 0:
        return
    path = ("available_node_types", str(cluster.head_node_type), "resources")
    yield Fault(path, "tasks run on the head", 'write resources: {"CPU": 0}')


@rule("cluster-docker-incomplete", "error", "cluster")
def docker_incomplete(file: File, project: Project) -> Iterator[Fault]:
    """Ray asserts that a container has both a name and an image."""
    docker = spec(file).docker
    image = docker.image or (docker.head_image and docker.worker_image)
    if image and not docker.container_name:
        yield Fault(("docker",), "docker has no `container_name`", "add `container_name: ray`")
    elif docker.container_name and not image:
        yield Fault(("docker",), "docker has no `image`", "add `image: rayproject/ray:…`")


@rule("cluster-start-command", "error", "cluster")
def start_command(file: File, project: Project) -> Iterator[Fault]:
    """A head without --head, or workers without the head's address, make separate clusters."""
    cluster = spec(file)
    head = _ray_starts(cluster.head_start_ray_commands)
    workers = _ray_starts(cluster.worker_start_ray_commands)
    for i, command in head.items():
        if not re.search(r"--head\b", command):
            yield Fault(("head_start_ray_commands", i), "`ray start` without --head", "add --head")
    for i, command in workers.items():
        path = ("worker_start_ray_commands", i)
        if re.search(r"--head\b", command):
            yield Fault(path, "a worker starts a head of its own", "replace --head by --address")
        elif "--address" not in command:
            fix = "add --address=$RAY_HEAD_IP:6379"
            yield Fault(path, "`ray start` of the workers has no --address", fix)
    yield from _ports(cluster)


def _ports(cluster: ClusterSpec) -> Iterator[Fault]:
    port = _start_option(cluster.head_start_ray_commands, "port") or "6379"
    for i, command in _ray_starts(cluster.worker_start_ray_commands).items():
        match = re.search(r"--address[= ]['\"]?[^\s:'\"]+:(\d+)", command)
        if match and match[1] != port and cluster.head_start_ray_commands:
            what = f"workers look for the head on port {match[1]}, it listens on {port}"
            yield Fault(("worker_start_ray_commands", i), what, "write the same port in both")


@rule("cluster-start-option", "error", "cluster")
def start_option(file: File, project: Project) -> Iterator[Fault]:
    """`ray start` refuses an option that it does not know: no node ever joins."""
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        for i, command in _ray_starts(getattr(spec(file), key)).items():
            arguments = command.split("ray start", 1)[1].split(";")[0].split("&&")[0]
            for option in re.findall(r"(?<=\s)--([a-z][a-z0-9-]*)", arguments):
                close = nearest(option, ray.START_OPTIONS)
                if option not in ray.START_OPTIONS and close:
                    what = f"`ray start` has no option --{option}"
                    yield Fault((key, i), what, f"did you mean --{close}?")


@rule("cluster-no-autoscaler", "warning", "cluster")
def no_autoscaler(file: File, project: Project) -> Iterator[Fault]:
    """Without --autoscaling-config the head starts alone and no worker ever follows."""
    for i, command in _ray_starts(spec(file).head_start_ray_commands).items():
        if "--autoscaling-config" not in command:
            fix = "add --autoscaling-config=~/ray_bootstrap_config.yaml"
            yield Fault(("head_start_ray_commands", i), "the head starts no workers", fix)


@rule("cluster-file-mount-missing", "warning", "cluster")
def file_mount_missing(file: File, project: Project) -> Iterator[Fault]:
    """`ray up` stops at a file that is not there."""
    for remote, local in spec(file).file_mounts.items():
        if isinstance(local, str) and not remote.endswith("auth_token") and not _exists(local):
            fix = "make it, or run from the folder that has it"
            yield Fault(("file_mounts", remote), f"{local} is not on this machine", fix)


def _exists(path: str) -> bool:
    try:
        return Path(path).expanduser().exists()
    except (OSError, RuntimeError, ValueError):
        return False


def _ray_starts(commands: tuple[str, ...] | None) -> dict[int, str]:
    found = enumerate(commands or ())
    return {i: command for i, command in found if re.search(r"\bray start\b", command)}


def _start_option(commands: tuple[str, ...] | None, option: str) -> str | None:
    """Ray has a fixed list of providers; any other ends `ray up` with a traceback."""
    for command in _ray_starts(commands).values():
        if match := re.search(rf"\s--{option}[= ]['\"]?([^\s'\";]+)", command):
            return match[1]
    return None
