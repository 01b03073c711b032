"""A Ray Serve config, as far as Manta looks into it offline. The format is Ray's, not ours.

Source: ray/serve/schema.py and config.py of Ray 2.60 (`ServeDeploySchema`), which `manta deploy`
applies itself; here the same types without importing Ray, and unknown keys let through: rules of
`manta.check` tell the misspelt ones from the merely unusual.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field

from manta.spec.loading import Spec

SPLIT = ("prefill_config", "decode_config")
"""Arguments of an LLM application whose prompts are read and whose answers are written apart."""


def _list(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


class _ServeSpec(Spec):
    model_config = ConfigDict(extra="ignore")


Bundles = Annotated[tuple[dict[str, float], ...], BeforeValidator(_list)]
"""Resources of each part of a placement group."""


class Autoscaling(_ServeSpec):
    """How many replicas, by load."""

    min_replicas: int | None = Field(None, ge=0)
    initial_replicas: int | None = Field(None, ge=0)
    max_replicas: int | None = Field(None, gt=0)
    target_ongoing_requests: float | None = Field(None, gt=0)
    metrics_interval_s: float | None = Field(None, gt=0)
    look_back_period_s: float | None = Field(None, gt=0)
    downscale_delay_s: float | None = Field(None, ge=0)
    upscale_delay_s: float | None = Field(None, ge=0)


class ActorOptions(_ServeSpec):
    """What one replica holds."""

    num_cpus: float | None = Field(None, ge=0)
    num_gpus: float | None = Field(None, ge=0)
    memory: float | None = Field(None, ge=0)
    resources: dict[str, float] = Field(default_factory=dict)
    accelerator_type: str | None = None


class Deployment(_ServeSpec):
    """Settings of one deployment, over those in its code."""

    name: str
    num_replicas: Annotated[int, Field(gt=0)] | Literal["auto"] | None = None
    max_ongoing_requests: int | None = Field(None, gt=0)
    max_queued_requests: int | None = Field(None, ge=-1)
    autoscaling_config: Autoscaling | None = None
    ray_actor_options: ActorOptions | None = None
    placement_group_bundles: Bundles | None = None
    placement_group_strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] | None = (
        None
    )
    max_replicas_per_node: int | None = Field(None, ge=1)
    user_config: dict[str, Any] | None = None
    graceful_shutdown_timeout_s: float | None = Field(None, ge=0)
    graceful_shutdown_wait_loop_s: float | None = Field(None, ge=0)
    health_check_period_s: float | None = Field(None, gt=0)
    health_check_timeout_s: float | None = Field(None, gt=0)


class Application(_ServeSpec):
    """One application, started by its builder or bound deployment."""

    import_path: str
    name: str = "default"
    route_prefix: str | None = "/"
    args: dict[str, Any] = Field(default_factory=dict)
    """What the builder gets."""
    runtime_env_passthrough: dict[str, Any] | None = Field(None, alias="runtime_env")
    deployments: Annotated[tuple[Deployment, ...], BeforeValidator(_list)] = ()
    external_scaler_enabled: bool = False


class HttpOptions(_ServeSpec):
    """Where Serve's proxy listens."""

    host: str | None = None
    port: Annotated[int, Field(ge=0, le=65535)] | None = None


class ServeSpec(_ServeSpec):
    """A file that `serve deploy` takes."""

    applications: Annotated[tuple[Application, ...], BeforeValidator(_list)]
    proxy_location: Literal["Disabled", "HeadOnly", "EveryNode"] | None = None
    http_options: HttpOptions | None = None
    grpc_options: dict[str, Any] | None = None
    logging_config: dict[str, Any] | None = None
    target_capacity: float | None = Field(None, ge=0, le=100)
