"""The remembered scheduler decides exactly as Ray's own, on generated clusters and demands."""

from __future__ import annotations

import random

import pytest

from manta.plan.clusters import NodeType
from manta.plan.demand import Bundle, Demand, Gang, Request, bundle_of
from manta.plan.ray_scheduler import decide


def node_types(rng: random.Random) -> list[NodeType]:
    made = [NodeType(name="head", resources={"CPU": rng.choice([0, 0, 2, 8])})]
    for i in range(rng.randint(1, 6)):
        resources: dict[str, float] = {"CPU": rng.choice([1, 2, 4, 8, 16])}
        if rng.random() < 0.4:
            resources["GPU"] = rng.choice([1, 2, 4, 8])
        if rng.random() < 0.3:
            resources["memory"] = rng.choice([8, 16, 64]) * 2.0**30
        largest = rng.randint(0, 6)
        made.append(
            NodeType(
                name=f"t{i}",
                resources=resources,
                min_workers=rng.choice([0, 0, min(2, largest)]),
                max_workers=largest,
                priority=rng.choice([0, 0, 10, -5]),
                labels={"zone": rng.choice("ab")} if rng.random() < 0.5 else {},
            )
        )
    return made


def bundle(rng: random.Random) -> Bundle:
    resources = {"CPU": rng.choice([0, 0.5, 1, 2, 3, 8]), "GPU": rng.choice([0, 0, 0.25, 1, 2, 8])}
    if rng.random() < 0.15:
        resources["memory"] = rng.choice([1, 7]) * 2.0**30
    return bundle_of(resources) or bundle_of({"CPU": 1})


def demand(rng: random.Random) -> Demand:
    requests = tuple(
        Request(
            bundle=bundle(rng),
            count=rng.choice([1, 2, 5, 20, 60]),
            labels=(("zone", rng.choice("ab")),) if rng.random() < 0.2 else (),
        )
        for _ in range(rng.randint(0, 5))
    )
    strategies = ["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]
    gangs = tuple(
        Gang(
            bundles=(bundle(rng),) * rng.randint(1, 4) + (bundle(rng),) * rng.randint(0, 3),
            strategy=rng.choice(strategies),  # type: ignore[arg-type]
        )
        for _ in range(rng.randint(0, 3))
    )
    return Demand(requests=requests, gangs=gangs)


@pytest.mark.parametrize("seed", range(120))
def test_remembering_changes_no_decision(seed: int) -> None:
    rng = random.Random(seed)
    types, asked, max_nodes = node_types(rng), demand(rng), rng.choice([3, 8, 30])
    assert decide(types, "head", max_nodes, asked) == decide(
        types, "head", max_nodes, asked, remember=False
    )


def test_node_types_that_tie_take_turns_as_with_ray() -> None:
    twins = [NodeType(name=n, resources={"GPU": 1}, max_workers=3) for n in ("a", "b", "c")]
    types = [NodeType(name="head", resources={"CPU": 0}), *twins]
    asked = Demand(requests=(Request(bundle=bundle_of({"GPU": 1}), count=7),))
    made = decide(types, "head", 30, asked)
    assert made == decide(types, "head", 30, asked, remember=False)
    assert sum(count for _, count in made.launches) == 7


def test_another_ray_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    from manta.errors import MantaError

    monkeypatch.setattr(ray, "__version__", "9.9.9")
    with pytest.raises(MantaError, match=r"needs ray 2\.60\.0; this is ray 9\.9\.9"):
        decide([NodeType(name="head", resources={})], "head", 1, Demand())
