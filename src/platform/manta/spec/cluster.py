"""A Ray cluster YAML, as far as Manta looks into it. The format is Ray's, not ours.

Source: ray/autoscaler/ray-schema.json of Ray 2.60 and what its loader does before it applies that
(`prepare_config`). Types are as strict as Ray's: `min_workers: "2"` is refused there and here.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Field

from manta.spec.loading import Spec


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Commands = Annotated[tuple[str, ...], BeforeValidator(_tuple)]
"""Shell commands."""
Items = Annotated[tuple[Any, ...], BeforeValidator(_tuple)]
Count = Annotated[int, Field(ge=0)]


class _RaySpec(Spec):
    model_config = ConfigDict(strict=True)


class NodeDocker(_RaySpec):
    """What a node type changes of the cluster's `docker`."""

    worker_image: str | None = None
    worker_run_options: Items = ()
    pull_before_run: bool | None = None


class NodeType(_RaySpec):
    """One kind of machine that the autoscaler may start."""

    resources: dict[str, Count]
    """Logical resources of a node; Ray takes whole numbers only."""
    node_config_passthrough: dict[str, Any] = Field(default_factory=dict, alias="node_config")
    """The provider's own launch request."""
    min_workers: int | None = None
    max_workers: int | None = None
    idle_timeout_s: float | None = None
    priority: int | None = None
    """Of equally good types the autoscaler starts the one of higher priority."""
    labels: dict[str, str] = Field(default_factory=dict)
    initialization_commands: Commands | None = None
    worker_setup_commands: Commands | None = None
    docker: NodeDocker | None = None


class Docker(_RaySpec):
    """The container that everything runs in; absent or empty: no container."""

    image: str | None = None
    head_image: str | None = None
    worker_image: str | None = None
    container_name: str | None = None
    pull_before_run: bool | None = None
    run_options: Items = ()
    head_run_options: Items = ()
    worker_run_options: Items = ()
    disable_automatic_runtime_detection: bool | None = None
    disable_shm_size_detection: bool | None = None
    use_podman: bool | None = None


class Auth(_RaySpec):
    """How Ray logs in to nodes."""

    ssh_user: str | None = None
    ssh_public_key: str | None = None
    ssh_private_key: str | None = None
    ssh_proxy_command: str | None = None
    ssh_proxy_use_node_id: bool | None = None


class SecurityGroup(_RaySpec):
    """AWS: the group that Ray finds or makes."""

    GroupName: str | None = None
    IpPermissions: Items = ()


class Provider(_RaySpec):
    """The cloud. Ray takes any further key here; `provider-unknown-key` looks at those."""

    model_config = ConfigDict(strict=True, extra="allow")

    type: str
    region: str | None = None
    location: str | None = None
    availability_zone: str | None = None
    project_id: str | None = None
    resource_group: str | None = None
    subscription_id: str | None = None
    head_ip: str | None = None
    worker_ips: Items | None = None
    use_internal_ips: bool = False
    cache_stopped_nodes: bool | None = None
    security_group: SecurityGroup | None = None
    tags: dict[str, Any] | None = None
    module: str | None = None


class ClusterSpec(_RaySpec):
    """A file that `ray up` takes."""

    cluster_name: str
    provider: Provider
    max_workers: Annotated[int, Field(ge=0)] | None = None
    min_workers: int | None = None
    """On-prem only; Ray drops it for every other provider."""
    upscaling_speed: Annotated[float, Field(ge=0)] | None = None
    idle_timeout_minutes: Annotated[float, Field(ge=0)] | None = None
    auth: Auth = Auth()
    docker: Docker = Docker()
    available_node_types: dict[str, NodeType] | None = None
    """None: Ray's defaults for the provider (`ray/autoscaler/aws/defaults.yaml` …)."""
    head_node_type: Annotated[str | None, BeforeValidator(lambda v: v or None)] = None
    """Ray's on-prem examples write `{}` for none."""
    head_node: dict[str, Any] | None = None
    """Legacy; Ray drops it if it is empty and refuses it otherwise."""
    worker_nodes: dict[str, Any] | None = None
    file_mounts: dict[str, Any] = Field(default_factory=dict)
    cluster_synced_files: Items = ()
    file_mounts_sync_continuously: bool | None = None
    rsync_exclude: Items = ()
    rsync_filter: Items = ()
    metadata: dict[str, Any] = Field(default_factory=dict)
    initialization_commands: Commands | None = None
    setup_commands: Commands | None = None
    head_setup_commands: Commands | None = None
    worker_setup_commands: Commands | None = None
    head_start_ray_commands: Commands | None = None
    worker_start_ray_commands: Commands | None = None

    @property
    def node_types(self) -> dict[str, NodeType]:
        """The declared node types; none on-prem or where Ray's defaults apply."""
        return self.available_node_types or {}

    @property
    def worker_types(self) -> dict[str, NodeType]:
        """Node types that may start workers."""
        return {
            name: node_type
            for name, node_type in self.node_types.items()
            if name != self.head_node_type or node_type.max_workers
        }

    def limit(self, name: str) -> int:
        """Workers of node type `name` that may exist: Ray's default is the cluster's limit."""
        node_type = self.node_types[name]
        cluster = 2 if self.max_workers is None else self.max_workers
        if node_type.max_workers is None:
            return 0 if name == self.head_node_type else cluster
        return min(node_type.max_workers, cluster)
