"""How long a plan takes: 1,000 node types × 10,000 requests, against Ray's scheduler unaided.

    python bench/plan.py [--json FILE] [--unaided-s SECONDS]

Ray unaided is given a limit, and a smaller case that it can finish gives the ratio.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from manta.plan.clusters import NodeType
from manta.plan.demand import Demand, Request, bundle_of
from manta.plan.ray_scheduler import RAY_VERSION, decide

REPETITIONS = 3
SMALL = (50, 500)


def main() -> None:
    """Run, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--unaided-s", type=float, default=60.0)
    arguments = parser.parse_args()
    results = [measure(name, 1000, 10_000, arguments.unaided_s) for name in DEMANDS]
    small = [measure(name, *SMALL, arguments.unaided_s) for name in DEMANDS]
    rows = results + small
    columns = ("demand", "types", "requests", "wall s", "CPU s", "Ray alone s")
    print("{:28} {:>6} {:>8} {:>8} {:>8} {:>12}".format(*columns))
    for row in rows:
        alone = row["unaided_wall_s"]
        shown = f"> {arguments.unaided_s:g}" if alone is None else f"{alone:.2f}"
        print(
            f"{row['demand']:28} {row['num_node_types']:>6} {row['num_requests']:>8} "
            f"{row['wall_s']:>8.2f} {row['cpu_s']:>8.2f} {shown:>12}"
        )
    ratios = [r["unaided_wall_s"] / r["wall_s"] for r in small if r["unaided_wall_s"]]
    report = {
        "machine": {
            "cpus": os.cpu_count(),
            "load": os.getloadavg(),
            "python": platform.python_version(),
        },
        "ray": RAY_VERSION,
        "rows": rows,
        "ratio_unaided_to_manta_small": statistics.median(ratios) if ratios else None,
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


def measure(name: str, num_types: int, num_requests: int, unaided_s: float) -> dict[str, Any]:
    """Median of repetitions; Ray alone once, in a process that is ended at the limit."""
    types, demand = node_types(num_types), DEMANDS[name](num_requests)
    walls, cpus = [], []
    for _ in range(REPETITIONS):
        wall, cpu = time.perf_counter(), time.process_time()
        decide(types, "head", 10**6, demand)
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return {
        "demand": name,
        "num_node_types": num_types,
        "num_requests": num_requests,
        "wall_s": statistics.median(walls),
        "cpu_s": statistics.median(cpus),
        "wall_s_all": walls,
        "unaided_wall_s": _unaided(types, demand, unaided_s),
    }


def node_types(count: int) -> list[NodeType]:
    """Machines of mixed size, GPUs in half of them; all differ in memory, so none are twins."""
    rng = random.Random(0)
    made = [NodeType(name="head", resources={"CPU": 0})]
    for i in range(count):
        cpus, gpus = rng.choice([2, 4, 8, 16, 32, 64, 96, 192]), rng.choice([0, 0, 1, 1, 4, 8])
        resources: dict[str, float] = {"CPU": cpus, "memory": cpus * 4 * 2.0**30 + i}
        if gpus:
            resources["GPU"] = gpus
        made.append(
            NodeType(
                name=f"t{i}",
                resources=resources,
                max_workers=rng.choice([10, 100, 1000]),
                priority=i % 7,
            )
        )
    return made


def _one(resources: Mapping[str, float], count: int) -> Demand:
    return Demand(requests=(Request(bundle=bundle_of(resources), count=count),))


def _mixed(count: int) -> Demand:
    shapes = [{"CPU": 1 + i % 5, "GPU": i % 3, "memory": (1 + i) * 2.0**30} for i in range(20)]
    requests = (Request(bundle=bundle_of(shape), count=count // 20) for shape in shapes)
    return Demand(requests=tuple(requests))


DEMANDS: dict[str, Callable[[int], Demand]] = {
    "one GPU each": lambda n: _one({"GPU": 1}, n),
    "one CPU each": lambda n: _one({"CPU": 1}, n),
    "twenty shapes": _mixed,
    "eight GPUs each (a node each)": lambda n: _one({"GPU": 8}, n),
}


def _unaided(types: list[NodeType], demand: Demand, limit_s: float) -> float | None:
    queue: multiprocessing.Queue[float] = multiprocessing.Queue()
    child = multiprocessing.Process(target=_run_unaided, args=(queue, types, demand))
    child.start()
    child.join(limit_s)
    if child.is_alive():
        child.terminate()
        child.join()
        return None
    return queue.get()


def _run_unaided(
    queue: multiprocessing.Queue[float], types: list[NodeType], demand: Demand
) -> None:
    start = time.perf_counter()
    decide(types, "head", 10**6, demand, remember=False)
    queue.put(time.perf_counter() - start)


if __name__ == "__main__":
    main()
