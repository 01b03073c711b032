"""What the durable queue costs: time until a job runs, beside plain `ray job submit`; and size.

    python bench/jobqueue.py [--json FILE] [--repetitions N] [--jobs N] [--postgresql [URL]]
                             [--only-size]

The first part needs a cluster (`manta up`): the same command is sent by turns with `ray job submit
--no-wait` and `manta submit --no-wait`, and writes down the moment at which it runs. The second
fills a state with queued jobs and lists, filters and schedules them, in a process of its own: in
an SQLite file, and with --postgresql in an empty database at URL, or on a server that it starts.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import throwaway
from common import machine, table, write_json

if TYPE_CHECKING:
    from manta.jobs.model import JobRequest

BIN = Path(sys.executable).parent
SHAPES = tuple(json.dumps([["GPU", float(n)]]) for n in (1, 2, 4, 8))
NUM_USERS, NUM_TEAMS = 50, 10


def main() -> None:
    """Run, print tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--jobs", type=int, default=100_000)
    parser.add_argument("--postgresql", nargs="?", const="", metavar="URL")
    parser.add_argument("--only-size", action="store_true", help="needs no cluster")
    parser.add_argument("--fill", metavar="URL", help=argparse.SUPPRESS)
    parser.add_argument("--measure", metavar="URL", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.fill:
        fill(arguments.fill, arguments.jobs)
    elif arguments.measure:
        print(json.dumps(size(arguments.measure, arguments.jobs)))
    else:
        measure(arguments)


def measure(arguments: argparse.Namespace) -> None:
    """Both parts."""
    result: dict[str, Any] = {"machine": machine()}
    if not arguments.only_size:
        latency, shipping = measure_latency(arguments.repetitions), measure_shipping()
        print(table(latency["rows"]), end="\n\n")
        rows = [{"log shipping": name, "value": f"{v:.3g}"} for name, v in shipping.items()]
        print(table(rows), end="\n\n")
        result |= {"latency": latency, "shipping": shipping}
    large = measure_sizes(arguments.jobs, arguments.postgresql)
    names = large["SQLite"]
    print(table([{"": n, **{kind: f"{large[kind][n]:.4g}" for kind in large}} for n in names]))
    if arguments.json:
        write_json(arguments.json, result | {"size": large})


def measure_latency(repetitions: int) -> dict[str, Any]:
    """Seconds from the start of the command until the job's first instruction."""
    from manta.cluster import record

    cluster = record.find()
    environment = {**os.environ, **cluster.client_environment()}
    ways = {
        "ray job submit": [str(BIN / "ray"), "job", "submit", "--working-dir", ".", "--no-wait"],
        "manta submit": [str(BIN / "manta"), "submit", "--no-wait"],
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory(prefix="m-bench-") as folder:
        for number in range(repetitions + 1):
            for name, words in ways.items():
                taken = _until_runs(words, Path(folder), environment)
                if number:  # the first of each warms caches and starts the controller
                    seconds[name].append(taken)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    rows = [
        {"": name, "median s": f"{medians[name]:.2f}", "all": " ".join(f"{s:.2f}" for s in values)}
        for name, values in seconds.items()
    ]
    plain, ours = medians["ray job submit"], medians["manta submit"]
    return {
        "rows": rows,
        "seconds": seconds,
        "added_latency_s": ours - plain,
        "ratio_manta_to_ray": ours / plain,
    }


def _until_runs(words: list[str], folder: Path, environment: dict[str, str]) -> float:
    mark = folder / f"mark-{time.monotonic_ns()}"
    project = folder / "project"
    project.mkdir(exist_ok=True)
    command = f"date +%s.%N > {shlex.quote(str(mark))}.new; mv {mark}.new {mark}"
    begun = time.time()
    subprocess.run(
        [*words, "--", "sh", "-c", command],
        cwd=project,
        env=environment,
        check=True,
        capture_output=True,
    )
    while not mark.exists():
        time.sleep(0.01)
    return float(mark.read_text()) - begun


def measure_shipping(rate_mb_per_s: int = 5, seconds: int = 8) -> dict[str, float]:
    """Ship a growing log to a folder: CPU of the shipper, and how far it is behind."""
    from manta.jobs import logs
    from manta.jobs.shipper import FileSource, Shipper

    code = (
        "import sys, time\n"
        "with open(sys.argv[1], 'wb') as f:\n"
        f"    for _ in range({seconds * 10}):\n"
        f"        f.write(b'x' * {rate_mb_per_s * 100_000}); f.flush(); time.sleep(0.1)\n"
    )
    with tempfile.TemporaryDirectory(prefix="m-bench-") as folder:
        file, url = Path(folder, "driver.log"), f"{folder}/log"
        shipper = Shipper()
        shipper.follow_source("j", url, lambda offset: FileSource(file, offset))
        shipper.start()
        begun = time.process_time()
        writer = subprocess.Popen([sys.executable, "-c", code, str(file)])
        behind = []
        while writer.poll() is None:
            time.sleep(0.5)
            written = file.stat().st_size if file.exists() else 0
            shipped = sum(f.stat().st_size for f in Path(url).glob("0*")) if written else 0
            behind.append((written - shipped) / (rate_mb_per_s * 1e6))
        while shipper.finish("j") is None:
            time.sleep(0.05)
        cpu_s = time.process_time() - begun
        num_bytes = sum(map(len, logs.read(url)))
        shipper.close()
    return {
        "MB/s": rate_mb_per_s,
        "MB": num_bytes / 1e6,
        "percent of a core per 1 MB/s": 100 * cpu_s / (num_bytes / 1e6),
        "most seconds behind": max(behind),
    }


def measure_sizes(num_jobs: int, postgresql: str | None) -> dict[str, dict[str, float]]:
    """Kind of database → what `size` gives.

    Args:
        num_jobs: so many are queued.
        postgresql: URL of an empty database; empty: a server is started; None: SQLite alone.
    """
    with throwaway.sqlite() as url:
        found = {"SQLite": measure_size(url, num_jobs)}
    if postgresql is not None:
        given = contextlib.nullcontext(postgresql)
        with given if postgresql else throwaway.postgresql() as url:
            found["PostgreSQL"] = measure_size(url, num_jobs)
    return found


def measure_size(url: str, num_jobs: int) -> dict[str, float]:
    """What `size` gives, in a process that has done nothing else."""
    words = [sys.executable, __file__, "--jobs", str(num_jobs)]
    subprocess.run([*words, "--fill", url], check=True)
    measure = [*words, "--measure", url]
    done = subprocess.run(measure, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, float] = json.loads(done.stdout)
    return result


def size(url: str, num_jobs: int) -> dict[str, float]:
    """List, filter, load and schedule; milliseconds, and MiB of this process."""
    from manta import state as states
    from manta.jobs import lease as leases
    from manta.jobs import passes, queries, spending, store
    from manta.jobs.books import Shares
    from manta.jobs.model import JobState
    from manta.jobs.view import View

    state = states.open_state(url)
    result: dict[str, float] = {"jobs": num_jobs}
    result["list newest 100 ms"] = _ms(lambda: queries.listed(state, limit=100))
    result["filter by user, newest 100 ms"] = _ms(
        lambda: queries.listed(state, user="user7", states=(JobState.QUEUED,), limit=100)
    )
    result["find one ms"] = _ms(lambda: queries.get(state, f"job-{num_jobs // 2}"))
    view = View(state)
    begun = time.perf_counter()
    view.refresh()
    result["controller loads the queue ms"] = 1000 * (time.perf_counter() - begun)
    rooms = {
        name: passes.room(name, True, {"GPU": 64.0}, 64) for name in ("east", "west", "north")
    }
    result["scheduling pass ms"] = _ms(
        lambda: passes.run(time.time(), view.waiting, (), rooms, Shares(), preempt=False)
    )
    result["refresh after nothing ms"] = _ms(view.refresh)
    numbers = iter(range(100))

    def again() -> None:
        store.submit(state, _request(f"new-{next(numbers)}", 7, SHAPES[0]), "bench")

    result["submit one ms"] = _ms(again)
    result["refresh after one ms"] = _ms(view.refresh, before=again)
    held = leases.acquire(state)
    assert held is not None
    starts = [queries.get(state, f"new-{number}") for number in range(7)]
    result["write down one start ms"] = _ms(
        lambda: store.begin_attempt(state, held, starts.pop(), cluster="east", cluster_id="east")
    )
    result["memory MiB"] = psutil.Process().memory_info().rss / 2**20
    result["what as many attempts cost ms"] = _ms(lambda: spending.report(state, "team", 0.0), 3)
    return result


def _ms(
    act: Callable[[], object],
    repetitions: int = 7,
    before: Callable[[], object] = lambda: None,
) -> float:
    taken = []
    for _ in range(repetitions):
        before()
        begun = time.perf_counter()
        act()
        taken.append(1000 * (time.perf_counter() - begun))
    return statistics.median(taken)


def fill(url: str, num_jobs: int) -> None:
    """Write a state with so many queued jobs, of many users, on three clusters of ten nodes.

    Each has an attempt behind it.
    """
    from manta import state as states

    state = states.open_state(url)
    chance = random.Random(0)
    rows = []
    for number in range(num_jobs):
        user = chance.randrange(NUM_USERS)
        asked = _request(f"job-{number}", user, chance.choice(SHAPES))
        same = {key: getattr(asked, key) for key in ("id", "name", "user", "team", "cluster")}
        rows.append(
            {
                **same,
                "version": 1,
                "state": "QUEUED",
                "origin": "manta",
                "priority": chance.choice((-10, 0, 0, 0, 10)),
                "shape": asked.shape,
                "digest": "0" * 64,
                "entrypoint": asked.entrypoint,
                "storage_url": asked.storage_url,
                "request": asked.model_dump_json(),
                "attempt": 0,
                "num_failures": 0,
                "submitted_at": 1.0,
                "not_before": 0.0,
                "queued_at": 1.0,
                "clusters": "",
                "spill_after_s": 0.0,
                "cause": "",
                "message": "",
                "stop_reason": "",
            }
        )
    with state.write() as connection:
        connection.execute(states.jobs.insert(), rows)
        connection.execute(states.attempts.insert(), [_attempt(row, chance) for row in rows])
        connection.execute(states.nodes.insert(), [_node(number) for number in range(30)])


def _request(job_id: str, user: int, shape: str) -> JobRequest:
    from manta.jobs.model import JobRequest

    return JobRequest(
        id=job_id,
        name="job",
        entrypoint="python jobs/train.py --config configs/train.yaml",
        runtime_env_passthrough={"working_dir": "gcs://_ray_pkg_0123456789abcdef.zip"},
        user=f"user{user}",
        team=f"team{user % NUM_TEAMS}",
        cluster=("east", "west", "north")[user % 3],
        shape=shape,
        storage_url="/nowhere",
    )


def _attempt(job: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    """One that ran for up to ten minutes, some time within three weeks."""
    row = dict.fromkeys(("cause", "message", "node_id"), "")
    begun = chance.uniform(0, 21 * 86_400)
    row |= {"job_id": job["id"], "submission_id": job["id"], "cluster": job["cluster"]}
    row |= {"cluster_id": job["cluster"], "state": "SUCCEEDED", "resources": "{}"}
    times = {"created_at": begun, "started_at": begun, "ended_at": begun + chance.uniform(0, 600)}
    return row | times | {"number": 1, "exit_code": 0, "log_state": "complete"}


def _node(number: int) -> dict[str, Any]:
    """One of eight GPUs that was there all the time."""
    texts = ("address", "node_type", "instance_type", "market", "price_source", "price_date")
    row: dict[str, Any] = dict.fromkeys(texts, "")
    cluster = ("east", "west", "north")[number % 3]
    row |= {"cluster_id": cluster, "cluster": cluster, "node_id": f"n{number}"}
    row |= {"resources": '{"CPU": 64, "GPU": 8, "slot": 16}', "unseen_s": 0.0}
    row |= {"opened_at": 0.0, "seen_at": 21 * 86_400.0, "closed_at": None, "usd_per_hour": 30.0}
    return row | {"idle_watts": 500, "full_watts": 3000, "pue": 1.1, "grid_gco2e_per_kwh": 300}


if __name__ == "__main__":
    main()
