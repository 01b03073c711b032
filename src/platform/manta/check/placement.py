"""Rules between files: does any cluster among those checked have room for what the others ask?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from manta.check.cluster_machines import instance_type
from manta.check.cluster_shape import FINDS_RESOURCES
from manta.check.packages import works
from manta.check.rules import Fault, File, Project, rule
from manta.check.serve import applications, deployments
from manta.check.serve_arguments import is_llm, llm_configs, num_engine_workers
from manta.spec import TrainConfig, TuneConfig
from manta.spec.cluster import ClusterSpec
from manta.spec.loading import Path_

Bundle = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Room:
    """What one node of a cluster offers."""

    resources: Mapping[str, float]
    accelerator: str | None
    num_nodes: int

    def holds(self, bundle: Bundle) -> bool:
        """Whether one bundle fits on one empty node."""
        for resource, amount in bundle.items():
            if resource.startswith("accelerator_type:"):
                if self.accelerator != resource.partition(":")[2]:
                    return False
            elif amount > self.resources.get(resource, 0):
                return False
        return True


def _rooms(cluster: ClusterSpec, project: Project) -> tuple[Room, ...] | None:
    """What the nodes of a cluster offer; None where only the machines themselves know."""
    if cluster.available_node_types is None:
        return None
    rooms = []
    for name, node_type in cluster.node_types.items():
        known = instance_type(cluster, node_type, project)
        resources: dict[str, float] = dict(node_type.resources)
        if cluster.provider.type in FINDS_RESOURCES and not {"CPU", "GPU"} <= resources.keys():
            if known is None:
                return None
            resources = {"CPU": known.num_cpus, "GPU": known.num_gpus, **resources}
        given = node_type.labels.get("ray.io/accelerator-type")
        named = [r.partition(":")[2] for r in resources if r.startswith("accelerator_type:")]
        if known is None and given is None and not named and resources.get("GPU"):
            return None
        accelerator = given or (named[0] if named else known.accelerator if known else None)
        nodes = cluster.limit(name) + (1 if name == cluster.head_node_type else 0)
        resources.setdefault("memory", known.memory_bytes if known else float("inf"))
        rooms.append(Room(resources=resources, accelerator=accelerator, num_nodes=nodes))
    return tuple(rooms)


def _misfit(bundles: Sequence[Bundle], together: bool, project: Project) -> str | None:
    """Why no cluster among the files can ever place the bundles; None if one can, or may."""
    if together and bundles:
        keys = {resource for bundle in bundles for resource in bundle}
        bundles = [{key: sum(bundle.get(key, 0) for bundle in bundles) for key in keys}]
    clusters = [f for f in project.of_kind("cluster") if isinstance(f.spec, ClusterSpec)]
    misfit = None
    for file in clusters:
        assert isinstance(file.spec, ClusterSpec)
        rooms = _rooms(file.spec, project)
        if rooms is None:
            return None
        homeless = [b for b in bundles if not any(r.num_nodes and r.holds(b) for r in rooms)]
        if not homeless:
            return None
        where = file.name if len(clusters) == 1 else "any of the cluster files"
        misfit = f"no node of {where} has {_words(homeless[0])}"
    return misfit


def _words(bundle: Bundle) -> str:
    return ", ".join(f"{resource}: {amount:g}" for resource, amount in sorted(bundle.items()))


_FIX = "ask for less, or add a node type that has it"


@rule("serve-unplaceable", "error", "serve")
def serve_unplaceable(file: File, project: Project) -> Iterator[Fault]:
    """A replica that fits on no node waits for ever, and the application never gets healthy."""
    for path, deployment in deployments(file):
        options = deployment.ray_actor_options
        if deployment.placement_group_bundles:
            strict = deployment.placement_group_strategy == "STRICT_PACK"
            misfit = _misfit(deployment.placement_group_bundles, strict, project)
            key = "placement_group_bundles"
        elif options:
            asked = _actor(options.model_dump(exclude_none=True))
            misfit, key = _misfit([asked], False, project), "ray_actor_options"
        else:
            continue
        if misfit:
            yield Fault((*path, key), misfit, _FIX)
    yield from _llm_unplaceable(file, project)


def _actor(options: Mapping[str, Any]) -> dict[str, float]:
    asked = {"CPU": options.get("num_cpus", 1.0), "GPU": options.get("num_gpus", 0.0)}
    asked |= {"memory": options.get("memory", 0.0), **options.get("resources", {})}
    if kind := options.get("accelerator_type"):
        asked[f"accelerator_type:{kind}"] = 0.001
    return {resource: float(amount) for resource, amount in asked.items() if amount}


def _llm_unplaceable(file: File, project: Project) -> Iterator[Fault]:
    for path, application in applications(file):
        for at, config in llm_configs(path, application) if is_llm(application) else ():
            key, bundles, strict = _llm_bundles(config)
            if bundles and (misfit := _misfit(bundles, strict, project)):
                yield Fault((*at, key), misfit, _FIX)


def _llm_bundles(config: dict[str, Any]) -> tuple[str, list[Bundle], bool]:
    """Key that decides, bundles of one replica, and whether all must be on one node."""
    group, workers = config.get("placement_group_config"), num_engine_workers(config)
    kind = config.get("accelerator_type")
    typed = {f"accelerator_type:{kind}": 0.001} if isinstance(kind, str) else {}
    if isinstance(group, dict):
        listed = group.get("bundles") or [group.get("bundle_per_worker")]
        plain = [b for b in listed if isinstance(b, dict) and _are_numbers(b)]
        strict = group.get("strategy") == "STRICT_PACK"
        return "placement_group_config", [{**b, **typed} for b in plain], strict
    if not typed or workers is None:
        return "accelerator_type", [], False
    return "accelerator_type", [{"GPU": 1.0, **typed}] * min(workers, 64), False


def _are_numbers(bundle: dict[str, Any]) -> bool:
    return all(isinstance(amount, int | float) for amount in bundle.values())


@rule("job-unplaceable", "error", ("job", "pipeline"))
def job_unplaceable(file: File, project: Project) -> Iterator[Fault]:
    """An entrypoint that fits on no node leaves its job pending for ever."""
    for path, work in works(file):
        held = work.resources
        asked = {"CPU": held.num_cpus, "GPU": held.num_gpus, "memory": float(held.memory_bytes)}
        bundle = {key: n for key, n in {**asked, **held.custom}.items() if n}
        if bundle and (misfit := _misfit([bundle], False, project)):
            yield Fault((*path, "resources"), misfit, _FIX)


@rule("workers-unplaceable", "error", "workload")
def workers_unplaceable(file: File, project: Project) -> Iterator[Fault]:
    """Training workers or trials that fit on no node leave their job waiting for ever."""
    for path, bundle in _worker_bundles(file):
        if misfit := _misfit([bundle], False, project):
            yield Fault(path, misfit, _FIX)


def _worker_bundles(file: File) -> Iterator[tuple[Path_, Bundle]]:
    if isinstance(file.spec, TrainConfig):
        scaling = file.spec.scaling
        bundle = {"CPU": scaling.cpus_per_worker, "GPU": scaling.gpus_per_worker}
        yield ("scaling",), {key: n for key, n in bundle.items() if n}
    elif isinstance(file.spec, TuneConfig):
        trial = {"CPU": file.spec.cpus_per_trial, "GPU": file.spec.gpus_per_trial}
        yield ("gpus_per_trial",), {key: n for key, n in trial.items() if n}
