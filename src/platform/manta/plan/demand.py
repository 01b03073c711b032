"""What work asks of a cluster: single requests, and gangs that start together or not at all."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from manta.errors import InputError
from manta.spec import WORKLOADS, GenerateConfig, JobSpec, TrainConfig, TuneConfig, load, script_of
from manta.spec.data import PrepareConfig
from manta.spec.jobs import Resources, Work
from manta.spec.loading import read
from manta.spec.serve import SPLIT

Strategy = Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]
Bundle = tuple[tuple[str, float], ...]
"""Resource name and quantity, sorted by name: `(("CPU", 1.0), ("GPU", 1.0))`."""

MAX_REQUESTS = 1_000_000
_COUNTED = re.compile(r"(?P<shape>\{.*\})\s*(?:[x×*]\s*(?P<count>\d+))?", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Request:
    """`count` times the same resources, each placed on its own (a task, an actor, a replica)."""

    bundle: Bundle
    count: int = 1
    labels: tuple[tuple[str, str], ...] = ()
    """Node labels that the node must have, all of them."""
    origin: str = ""
    """Who asks, for people."""

    def __str__(self) -> str:
        times = f" × {self.count}" if self.count > 1 else ""
        return show_bundle(self.bundle) + times


@dataclass(frozen=True, kw_only=True)
class Gang:
    """A placement group: all bundles at once, or none."""

    bundles: tuple[Bundle, ...]
    strategy: Strategy = "PACK"
    origin: str = ""

    def __str__(self) -> str:
        kinds = {bundle: self.bundles.count(bundle) for bundle in self.bundles}
        shown = " + ".join(f"{show_bundle(b)} × {n}" for b, n in kinds.items())
        return f"{self.strategy} [{shown}]"


@dataclass(frozen=True, kw_only=True)
class Demand:
    """All that is asked for at the same time."""

    requests: tuple[Request, ...] = ()
    gangs: tuple[Gang, ...] = ()

    def __add__(self, other: Demand) -> Demand:
        return Demand(requests=self.requests + other.requests, gangs=self.gangs + other.gangs)

    def __bool__(self) -> bool:
        return bool(self.requests or self.gangs)


def bundle_of(resources: Mapping[str, float]) -> Bundle:
    """Resources as a value: sorted, without zeros."""
    return tuple(sorted((name, float(n)) for name, n in resources.items() if n))


def show_bundle(bundle: Bundle) -> str:
    """`{CPU: 1, GPU: 1}`; memory in GiB."""
    parts = (
        f"memory: {n / 2**30:.3g} GiB" if name == "memory" else f"{name}: {n:g}"
        for name, n in bundle
    )
    return "{" + ", ".join(parts) + "}"


def parse_demand(text: str) -> Demand:
    """`{"GPU":1}x6`, `{"CPU":4}`, or `STRICT_SPREAD[{"GPU":8}x2]` as a demand.

    Raises:
        InputError: it is none of these.
    """
    words = text.strip()
    strategy, bracket, inner = words.partition("[")
    if bracket and strategy in ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"):
        if not inner.endswith("]"):
            raise _bad_demand(text)
        shapes = [_counted(part, text) for part in re.split(r",(?![^{]*\})", inner[:-1])]
        bundles = tuple(bundle for bundle, count in shapes for _ in range(count))
        return Demand(gangs=(Gang(bundles=bundles, strategy=strategy, origin=text),))  # type: ignore[arg-type]
    bundle, count = _counted(words, text)
    return Demand(requests=(Request(bundle=bundle, count=count, origin=text),))


def demand_of_job(file: str | Path) -> Demand:
    """What a job asks for: its entrypoint's own resources, and what its config will start.

    A script that Manta does not know asks for its entrypoint's resources only: its tasks cannot be
    read off a file. Raises InvalidSpec for a bad job or config file.
    """
    job = load(file, JobSpec)
    demand = _entrypoint(job.resources, job.name)
    script = script_of(job.entrypoint)
    model = WORKLOADS.get(script) if script else None
    config = Path(file).parent / job.config if job.config else None
    if config and not config.exists() and job.config:
        config = Path(job.config)  # paths in a job file are relative to the working directory
    if model is None or config is None:
        return demand
    return demand + _workload(load(config, model), job.name)


def demand_of_work(work: Work, entrypoint: str, root: Path, name: str) -> Demand:
    """The same for a job or step that is loaded; `root` is its working directory.

    Raises InvalidSpec for a bad config file.
    """
    demand = _entrypoint(work.resources, name)
    model = WORKLOADS.get(script_of(entrypoint) or "")
    if model is None or work.config is None or not (root / work.config).is_file():
        return demand
    return demand + _workload(load(root / work.config, model), name)


def demand_of_app(file: str | Path) -> Demand:
    """What the applications of a Serve config ask for when they start."""
    document = read(file)
    applications = document.value.get("applications")
    if not isinstance(applications, list):
        raise InputError(f"{file}: no `applications` list", "give a Ray Serve config")
    demand = Demand()
    for application in applications:
        if not isinstance(application, dict):
            raise InputError(f"{file}: an application must be a mapping")
        for deployment in application.get("deployments") or ():
            demand += _deployment(deployment, str(application.get("name", "default")))
        demand += _llm(application)
    return demand


def _entrypoint(resources: Resources, name: str) -> Demand:
    bundle = bundle_of(
        {
            "CPU": resources.num_cpus,
            "GPU": resources.num_gpus,
            "memory": resources.memory_bytes,
            **resources.custom,
        }
    )
    return (
        Demand(requests=(Request(bundle=bundle, origin=f"{name}: entrypoint"),))
        if bundle
        else Demand()
    )


def _workload(config: Any, name: str) -> Demand:
    if isinstance(config, TrainConfig):
        scaling = config.scaling
        worker = bundle_of({"CPU": scaling.cpus_per_worker, "GPU": scaling.gpus_per_worker})
        # Ray Train: one bundle a worker, one placement group, strategy PACK.
        gang = Gang(bundles=(worker,) * scaling.num_workers, origin=f"{name}: training workers")
        return Demand(gangs=(gang,))
    if isinstance(config, TuneConfig):
        trial = bundle_of({"CPU": config.cpus_per_trial, "GPU": config.gpus_per_trial})
        gang = Gang(bundles=(trial,), origin=f"{name}: trial")
        return Demand(gangs=(gang,) * min(config.num_trials, config.max_concurrent_trials))
    if isinstance(config, GenerateConfig):
        return Demand(requests=_engines(config, name))
    if isinstance(config, PrepareConfig):
        return Demand(requests=(Request(bundle=bundle_of({"CPU": 1}), origin=f"{name}: tasks"),))
    return Demand()


def _engines(config: GenerateConfig, name: str) -> tuple[Request, ...]:
    per_engine = int(config.engine_kwargs_passthrough.get("tensor_parallel_size", 1))
    per_engine *= int(config.engine_kwargs_passthrough.get("pipeline_parallel_size", 1))
    resources = {"GPU": float(per_engine)} if config.accelerator_type else {"CPU": 1.0}
    if config.accelerator_type:
        resources[f"accelerator_type:{config.accelerator_type}"] = 0.001  # as Ray writes it
    return (
        Request(
            bundle=bundle_of(resources), count=config.concurrency, origin=f"{name}: vLLM engines"
        ),
    )


def _deployment(deployment: Any, app: str) -> Demand:
    options = deployment.get("ray_actor_options") or {}
    scaling = deployment.get("autoscaling_config") or {}
    replicas = deployment.get("num_replicas", 1)
    if scaling or not isinstance(replicas, int):  # "auto"
        replicas = scaling.get("initial_replicas") or scaling.get("min_replicas", 1)
    origin = f"{app}: {deployment.get('name', 'deployment')}"
    bundles = deployment.get("placement_group_bundles")
    if bundles:
        strategy = deployment.get("placement_group_strategy", "PACK")
        gang = Gang(bundles=tuple(bundle_of(b) for b in bundles), strategy=strategy, origin=origin)
        return Demand(gangs=(gang,) * replicas)
    resources = {
        "CPU": options.get("num_cpus", 1),
        "GPU": options.get("num_gpus", 0),
        "memory": options.get("memory", 0),
        **(options.get("resources") or {}),
    }
    if options.get("accelerator_type"):
        resources[f"accelerator_type:{options['accelerator_type']}"] = 0.001
    bundle = bundle_of(resources)
    return Demand(requests=(Request(bundle=bundle, count=replicas, origin=origin),))


def _llm(application: Mapping[str, Any]) -> Demand:
    """Replicas of `ray.serve.llm` apps, whose builder reads `args.llm_configs`."""
    arguments = application.get("args") or {}
    configs = arguments.get("llm_configs") or ()
    split = [arguments[key] for key in SPLIT if key in arguments]
    demand = Demand()
    for config in [*configs, *split] if isinstance(configs, list | tuple) else ():
        if not isinstance(config, dict):
            continue  # a path to another file: not followed
        engine = config.get("engine_kwargs") or {}
        gpus = engine.get("tensor_parallel_size", 1) * engine.get("pipeline_parallel_size", 1)
        default = [{"GPU": 1}] * gpus if config.get("accelerator_type") else [{"CPU": 1}]
        group = config.get("placement_group_config") or {}
        if each := group.get("bundle_per_worker"):
            default = [each] * gpus
        kind = config.get("accelerator_type")
        typed = {f"accelerator_type:{kind}": 0.001} if kind else {}  # as Ray adds it
        deployment = {
            **(config.get("deployment_config") or {}),
            "name": (config.get("model_loading_config") or {}).get("model_id", "model"),
            "placement_group_bundles": [
                {**typed, **bundle} for bundle in group.get("bundles") or default
            ],
            "placement_group_strategy": group.get("strategy", "PACK"),
        }
        demand += _deployment(deployment, str(application.get("name", "default")))
    return demand


def _counted(words: str, text: str) -> tuple[Bundle, int]:
    match = _COUNTED.fullmatch(words.strip())
    if match is None:
        raise _bad_demand(text)
    try:
        resources = json.loads(match["shape"])
    except ValueError:
        raise _bad_demand(text) from None
    if not resources or not all(_is_quantity(value) for value in resources.values()):
        raise InputError(f"--demand {text}: each resource needs a number above 0", _EXAMPLE)
    count = int(match["count"] or 1)
    if not 1 <= count <= MAX_REQUESTS:
        raise InputError(f"--demand {text}: the count must be 1 to {MAX_REQUESTS:,}")
    return bundle_of(resources), count


_EXAMPLE = """write e.g. --demand '{"GPU": 1}x6' or --demand 'STRICT_SPREAD[{"GPU": 8}x2]'"""


def _is_quantity(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e18


def _bad_demand(text: str) -> InputError:
    return InputError(f"--demand {text}: not resources and a count", _EXAMPLE)


def total(demands: Sequence[Demand]) -> Demand:
    """Everything at once."""
    result = Demand()
    for demand in demands:
        result += demand
    return result
