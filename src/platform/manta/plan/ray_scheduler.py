"""The one place that touches Ray's autoscaler: its v2 scheduler, run offline.

Ray's own code decides which node types launch. Ours gives it the node types and the demand, and
(`scheduler_memo`) spares it from working the same thing out again.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.autoscaler.v2 import scheduler as ray_v2
from ray.autoscaler.v2.instance_manager.config import NodeTypeConfig
from ray.autoscaler.v2.schema import AutoscalerInstance
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import (
    GangResourceRequest,
    NodeState,
    ResourceRequest,
    ResourceRequestByCount,
)
from ray.core.generated.common_pb2 import LabelSelectorOperator
from ray.core.generated.instance_manager_pb2 import Instance, NodeKind

from manta.errors import MantaError
from manta.plan.clusters import NodeType
from manta.plan.demand import Bundle, Demand, Gang, Request, bundle_of
from manta.plan.scheduler_memo import Memo

RAY_VERSION = "2.60.0"
"""The Ray whose internals this file knows. Another one may have moved them."""
_Kind = ResourceRequestUtil.PlacementConstraintType


@dataclass(frozen=True, kw_only=True)
class Placed:
    """One node of the planned cluster and what Ray put on it."""

    node_type: str
    is_head: bool
    bundles: tuple[Bundle, ...]


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What Ray's scheduler answered."""

    launches: tuple[tuple[str, int], ...]
    """(node type, number of nodes) in the order in which Ray asks for them."""
    nodes: tuple[Placed, ...]
    """The head and every node to launch."""
    pending_requests: tuple[tuple[Bundle, int], ...]
    pending_gangs: tuple[int, ...]
    """Indices into the demand's gangs."""


def decide(
    node_types: Sequence[NodeType],
    head: str,
    max_nodes: int,
    demand: Demand,
    *,
    remember: bool = True,
) -> Decision:
    """Which nodes Ray would launch next to a running head.

    Args:
        max_nodes: all nodes that the cluster may have, the head among them.
        remember: False runs Ray's scheduler unaided, for comparison; slow for large demands.

    Raises:
        MantaError: the installed Ray is not the one this file was written against.
    """
    _check_version()
    request = ray_v2.SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs={n.name: _config(n, is_head=n.name == head) for n in node_types},
        max_num_nodes=max_nodes,
        resource_requests=[_by_count(r) for r in demand.requests],
        gang_resource_requests=[_gang(i, gang) for i, gang in enumerate(demand.gangs)],
        current_instances=[_running_head(n) for n in node_types if n.name == head],
    )
    final: list[Any] = []
    with _watched(final, remember):
        reply = ray_v2.ResourceDemandScheduler().schedule(request)
    return Decision(
        launches=tuple((launch.instance_type, launch.count) for launch in reply.to_launch),
        nodes=tuple(_placed(node) for node in final),
        pending_requests=_counted(reply.infeasible_resource_requests),
        pending_gangs=tuple(
            sorted(int(g.details) for g in reply.infeasible_gang_resource_requests)
        ),
    )


def _check_version() -> None:
    if ray.__version__ != RAY_VERSION:
        raise MantaError(
            f"planning needs ray {RAY_VERSION}; this is ray {ray.__version__}",
            f'pip install "ray=={RAY_VERSION}"',
        )


def _config(node: NodeType, *, is_head: bool) -> NodeTypeConfig:
    return NodeTypeConfig(
        name=node.name,
        min_worker_nodes=node.min_workers,
        # As Ray does: the head counts against its own type.
        max_worker_nodes=node.max_workers + (1 if is_head else 0),
        resources=dict(node.resources),
        labels=dict(node.labels),
        priority=node.priority,
    )


def _running_head(node: NodeType) -> AutoscalerInstance:
    state = NodeState(node_id=b"head", ray_node_type_name=node.name)
    for name, quantity in node.resources.items():
        state.total_resources[name] = quantity
        state.available_resources[name] = quantity
    for name, value in node.labels.items():
        state.labels[name] = value
    instance = Instance(
        instance_id="head",
        instance_type=node.name,
        status=Instance.RAY_RUNNING,
        node_id="head",
        node_kind=NodeKind.HEAD,
    )
    return AutoscalerInstance(cloud_instance_id="head", ray_node=state, im_instance=instance)


def _by_count(request: Request) -> ResourceRequestByCount:
    selector = [
        (key, LabelSelectorOperator.LABEL_OPERATOR_IN, [value]) for key, value in request.labels
    ]
    made = ResourceRequestUtil.make(
        dict(request.bundle), label_selectors=[selector] if selector else None
    )
    return ResourceRequestByCount(request=made, count=request.count)


def _gang(index: int, gang: Gang) -> GangResourceRequest:
    """A placement group as the control store reports it: only the STRICT ones constrain nodes."""
    kinds = {"STRICT_PACK": _Kind.AFFINITY, "STRICT_SPREAD": _Kind.ANTI_AFFINITY}
    kind = kinds.get(gang.strategy)
    constraints = [(kind, f"_PG_{index}", "")] if kind else None
    requests = [ResourceRequestUtil.make(dict(b), constraints) for b in gang.bundles]
    return GangResourceRequest(requests=requests, details=str(index))


def _placed(node: Any) -> Placed:
    requests = node.get_sched_requests(ray_v2.ResourceRequestSource.PENDING_DEMAND)
    return Placed(
        node_type=node.node_type,
        is_head=node.node_kind == NodeKind.HEAD,
        bundles=tuple(bundle_of(request.resources_bundle) for request in requests),
    )


def _counted(requests: Sequence[ResourceRequest]) -> tuple[tuple[Bundle, int], ...]:
    counts: dict[Bundle, int] = {}
    for _, group in itertools.groupby(requests, key=id):
        members = list(group)
        bundle = bundle_of(members[0].resources_bundle)
        counts[bundle] = counts.get(bundle, 0) + len(members)
    return tuple(counts.items())


@contextmanager
def _watched(final: list[Any], remember: bool) -> Iterator[None]:
    """Run Ray's scheduler with a `Memo` in place of its per-node simulation; note its last nodes.

    Two static methods are exchanged while the scheduler runs, and put back. Not for use from two
    threads at once.
    """
    cls = ray_v2.ResourceDemandScheduler
    best, idle = cls.__dict__["_sched_best_node"], cls.__dict__["_enforce_idle_termination"]

    def note(ctx: Any) -> None:
        final.extend(ctx.get_nodes())
        idle.__func__(ctx)

    quiet = logging.getLogger("ray.autoscaler.v2.scheduler")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    cls._enforce_idle_termination = staticmethod(note)
    if remember:
        memo = Memo(best.__func__, _is_fresh)
        cls._sched_best_node = staticmethod(memo.best_node)
    try:
        yield
    finally:
        cls._sched_best_node, cls._enforce_idle_termination = best, idle
        quiet.setLevel(level)


def _is_fresh(node: Any) -> bool:
    return (
        node.status == ray_v2.SchedulingNodeStatus.TO_LAUNCH
        and node.im_instance_status is None
        and not any(node.sched_requests.values())
    )
