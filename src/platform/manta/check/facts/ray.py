"""Names that Ray's cluster launcher knows. Source: Ray 2.60, ray/scripts and ray/autoscaler.

A unit test compares the options of `ray start` with the installed Ray.
"""

from __future__ import annotations

PROVIDERS = (
    "aws",
    "gcp",
    "azure",
    "local",
    "vsphere",
    "aliyun",
    "external",
    "kuberay",
    "spark",
    "fake_multinode",
    "fake_multinode_docker",
    "readonly",
)

PROVIDER_REQUIRES = {
    "aws": ("region",),
    "gcp": ("region", "availability_zone", "project_id"),
    "azure": ("location", "resource_group"),
}
"""What the provider's code reads without a default."""


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_COMMON = _names(
    """
    type region availability_zone cache_stopped_nodes use_internal_ips use_external_head_ip
    disable_node_updaters disable_launch_config_check foreground_node_launch worker_liveness_check
    worker_rpc_drain module max_concurrent_launches launch_multiple
    """
)

PROVIDER_KEYS = {
    "aws": _COMMON | _names("security_group key_pair aws_credentials cloudwatch"),
    "gcp": _COMMON | _names("project_id gcp_credentials"),
    "azure": _COMMON
    | _names(
        """
        location resource_group subscription_id subnet_mask unique_id tags msi_name
        msi_resource_group msi_identity_id msi_identity_principal_id subnet_id msi nsg subnet
        """
    ),
    "local": _COMMON | _names("head_ip worker_ips coordinator_address external_head_ip"),
}
"""Provider → keys of `provider` that its code reads."""

START_OPTIONS = _names(
    """
    address autoscaling-config block cgroup-path dashboard-agent-grpc-port
    dashboard-agent-listen-port dashboard-host dashboard-port disable-usage-stats
    enable-object-reconstruction enable-resource-isolation head help include-dashboard
    include-log-monitor labels labels-file log-color log-style max-worker-port memory
    metrics-export-port min-worker-port no-monitor no-redirect-output node-ip-address
    node-manager-port node-name num-cpus num-gpus object-manager-port object-spilling-directory
    object-store-memory plasma-directory port proxy-server-url ray-client-server-port
    ray-debugger-external redis-password redis-shard-ports redis-username resources
    runtime-env-agent-port system-config system-reserved-cpu system-reserved-memory temp-dir
    tracing-startup-hook verbose worker-port-list
    """
)
"""Options of `ray start`, without dashes."""
