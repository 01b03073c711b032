"""Job and pipeline specs: the only formats that are Manta's own."""

from __future__ import annotations

import shlex
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from manta.spec.data import Name, PrepareConfig
from manta.spec.inference import AskConfig, EvaluateConfig, GenerateConfig
from manta.spec.loading import Spec
from manta.spec.training import TrainConfig, TuneConfig

WORKLOADS: dict[str, type[Spec]] = {
    "jobs/prepare.py": PrepareConfig,
    "jobs/tune.py": TuneConfig,
    "jobs/train.py": TrainConfig,
    "jobs/evaluate.py": EvaluateConfig,
    "jobs/generate.py": GenerateConfig,
    "jobs/ask.py": AskConfig,
}
"""Script → what its `--config` must hold, so that a mistake shows before anything starts."""


class Resources(Spec):
    """What the entrypoint itself holds; its tasks and actors ask for their own."""

    num_cpus: float = Field(0, ge=0)
    num_gpus: float = Field(0, ge=0)
    memory_bytes: int = Field(0, ge=0)
    custom: dict[str, float] = Field(default_factory=dict)
    """Ray's custom resources."""


RetryCause = Literal[
    "node_lost",
    "preempted",
    "head_gone",
    "out_of_memory",
    "no_agent",
    "no_resources",
    "environment",
    "timeout",
    "user_error",
    "unknown",
]
"""Why an attempt ended that a retry may help; `docs/jobs.md` says how each is told."""


class Retry(Spec):
    """When a job that failed is tried again."""

    max_retries: int = Field(3, ge=0, le=1000)
    on: tuple[RetryCause, ...] = (
        "node_lost",
        "preempted",
        "head_gone",
        "out_of_memory",
        "no_agent",
        "no_resources",
        "unknown",
    )
    """The user's own exception (`user_error`) is not among them unless written here."""
    backoff_s: float = Field(5.0, ge=0)
    """Before the first retry; doubles with each, up to 300 s."""
    larger: tuple[Resources, ...] = ()
    """What the entrypoint gets instead after it ran out of memory once, twice …"""


class Work(Spec):
    """What one Ray job runs; shared by a job file and a pipeline step."""

    config: str | None = None
    """Path of a file in the working directory; passed to the entrypoint as `--config PATH`."""
    runtime_env_passthrough: dict[str, Any] = Field(default_factory=dict, alias="runtime_env")
    """Ray's own runtime_env, merged over Manta's."""
    resources: Resources = Resources()
    environment: dict[str, str] = Field(default_factory=dict)
    retry: Retry = Retry()
    timeout_s: float | None = Field(None, gt=0)
    """Longest time that one attempt may run."""


class JobSpec(Work):
    """One job: `manta submit JOB.yaml`."""

    name: Name
    entrypoint: str = Field(min_length=1)
    """Shell command, run in the working directory on the cluster."""
    priority: Literal["low", "normal", "high"] = "normal"
    team: Name = "default"
    deadline_s: float | None = Field(None, gt=0)
    """Seconds after submission by which the job has ended, or is stopped."""
    budget_usd: float | None = Field(None, gt=0)
    """Most that all its attempts may cost: it is stopped when that is spent, and refused at once
    if running until `timeout_s` would cost more."""
    clusters: tuple[Name, ...] = ()
    """Where it may run, best first; empty: where `--cluster` says."""
    prefer: Literal["order", "price"] = "order"
    """Whether the first of `clusters` is best, or the one that is cheapest for this job when it is
    submitted; those without a known price come last."""
    spill_after_s: float = Field(300, ge=0)
    """How long it waits for place on one of them before it goes to another that has some."""


Scalar = str | bool | int | float
"""A value of a parameter or matrix; checked before the union, which tells a fault four times."""


def _scalar(value: object) -> object:
    if isinstance(value, Scalar):
        return value
    raise ValueError("not one value; write a text, a number, true or false")


def _scalar_or_none(value: object) -> object:
    return None if value is None else _scalar(value)


class Step(Work):
    """One step of a pipeline: a Ray job (`entrypoint`) or a Serve config (`deploy`)."""

    name: Name
    needs: tuple[str, ...] = ()
    """Steps that must have succeeded before this one starts."""
    entrypoint: str | None = Field(None, min_length=1)
    deploy: str | None = None
    """Path of a Ray Serve config to apply and wait for."""
    matrix: dict[
        str,
        Annotated[tuple[Annotated[Scalar, BeforeValidator(_scalar)], ...], Field(min_length=1)],
    ] = Field(default_factory=dict)
    """Key → values: the step runs once for each combination, see `expand`."""

    @model_validator(mode="after")
    def _one_kind(self) -> Step:
        if (self.entrypoint is None) == (self.deploy is None):
            raise ValueError("give either entrypoint or deploy; a step does one thing")
        return self


class PipelineSpec(Spec):
    """Steps, run in the order that `needs` allows: `manta run PIPELINE.yaml`."""

    name: Name
    params: dict[str, Annotated[Scalar | None, BeforeValidator(_scalar_or_none)]] = Field(
        default_factory=dict
    )
    """Parameter → value, which `--param` replaces; one without must be given."""
    steps: tuple[Step, ...] = Field(min_length=1)


def script_of(entrypoint: str) -> str | None:
    """The Python script that a command runs: `python -u jobs/x.py --y` → `jobs/x.py`."""
    try:
        words = shlex.split(entrypoint)
    except ValueError:
        return None
    return next((word for word in words if word.endswith(".py")), None)
