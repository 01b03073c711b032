"""Today's decisions of Ray's scheduler, pinned: after a Ray upgrade the difference shows.

Renew them with `python tests/unit/test_plan_golden.py`, and read the diff.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from manta.plan.clusters import Cluster, NodeType
from manta.plan.demand import parse_demand, total
from manta.plan.ray_scheduler import decide

GOLDEN = Path(__file__).parent / "golden" / "decisions.json"
HEAD = NodeType(name="head", resources={"CPU": 0})
SPOT = NodeType(name="gpu-spot", resources={"CPU": 8, "GPU": 1}, max_workers=4, priority=10)
ON_DEMAND = NodeType(name="gpu", resources={"CPU": 8, "GPU": 1}, max_workers=8)
BIG = NodeType(name="gpu8", resources={"CPU": 96, "GPU": 8}, max_workers=2, priority=-10)
CPU = NodeType(name="cpu", resources={"CPU": 16}, max_workers=10)
WITH_MEMORY = NodeType(
    name="cpu-memory", resources={"CPU": 16, "memory": 44 * 2.0**30}, max_workers=10
)
GPUS = (HEAD, SPOT, ON_DEMAND, BIG)

CASES: dict[str, tuple[tuple[NodeType, ...], int, tuple[str, ...]]] = {
    "four GPUs start four spot nodes": (GPUS, 30, ('{"GPU":1}x4',)),
    "six GPUs start one large node, over priority": (GPUS, 30, ('{"GPU":1}x6',)),
    "more than all GPUs: some wait": (GPUS, 30, ('{"GPU":1}x40',)),
    "CPU work avoids GPU nodes": ((HEAD, SPOT, CPU), 30, ('{"CPU":4}x10',)),
    "memory in a type's resources changes nothing here": (
        (HEAD, WITH_MEMORY, CPU),
        30,
        ('{"CPU":4}x10',),
    ),
    "the cluster's limit": ((HEAD, CPU), 3, ('{"CPU":16}x5',)),
    "a gang that fits nowhere leaves nothing": (GPUS, 30, ('STRICT_PACK[{"GPU":4}x3]',)),
    "STRICT_SPREAD takes a node each": (GPUS, 30, ('STRICT_SPREAD[{"GPU":1}x3]',)),
    "STRICT_PACK takes one node": (GPUS, 30, ('STRICT_PACK[{"GPU":1}x3]',)),
    "PACK is packed by utilization": (GPUS, 30, ('PACK[{"GPU":1,"CPU":4}x8]',)),
    "minimum workers start without demand": (
        (HEAD, NodeType(name="cpu", resources={"CPU": 16}, min_workers=2, max_workers=4)),
        30,
        (),
    ),
    "minimum workers are filled first": (
        (HEAD, NodeType(name="a", resources={"CPU": 4}, min_workers=1, max_workers=4), CPU),
        30,
        ('{"CPU":2}x3',),
    ),
    "a head with CPUs takes work": (
        (NodeType(name="head", resources={"CPU": 8}), CPU),
        30,
        ('{"CPU":4}x3',),
    ),
    "only a custom resource decides": (
        (HEAD, CPU, NodeType(name="tpu", resources={"CPU": 224, "TPU": 8}, max_workers=4)),
        30,
        ('{"TPU":8}x2', '{"CPU":1}x4'),
    ),
}


def decision(case: str) -> dict[str, object]:
    node_types, max_nodes, demands = CASES[case]
    made = decide(node_types, "head", max_nodes, total([parse_demand(d) for d in demands]))
    return {
        "launches": [list(launch) for launch in made.launches],
        "pending_requests": [[dict(b), n] for b, n in made.pending_requests],
        "pending_gangs": list(made.pending_gangs),
    }


@pytest.mark.parametrize("case", CASES)
def test_ray_still_decides_as_it_did(case: str) -> None:
    assert decision(case) == json.loads(GOLDEN.read_text())[case]


def test_every_pinned_decision_has_its_case() -> None:
    assert set(json.loads(GOLDEN.read_text())) == set(CASES)


def cluster(*node_types: NodeType, max_workers: int = 30) -> Cluster:
    return Cluster(
        file="x.yaml",
        name="x",
        provider="aws",
        cloud="aws",
        region="us-east-1",
        node_types=node_types,
        head="head",
        max_workers=max_workers,
    )


if __name__ == "__main__":
    decisions = {case: decision(case) for case in CASES}
    GOLDEN.write_text(json.dumps(decisions, indent=1, sort_keys=True) + "\n")
