"""jobs/prepare.py on a running local Ray cluster, beside one process that does the same work.

python bench/prepare.py [--json FILE] [--sizes 1,10] [--repetitions 3]

Size 1 is the standard library's source; size 10 is ten variants of each of its files, which differ
in their first line. Wall time of the whole command, imports included; the cluster is up before.
The plain process uses all cores for tokenizing, and writes no manifest, seal or content hashes.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from common import machine, table, write_json

from manta import spec, storage
from manta.workloads import text

REPOSITORY = Path(__file__).parents[1]
CONFIG = REPOSITORY / "configs" / "prepare.yaml"
HOLD_CLUSTER = """
import ray, sys
ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
print("address", ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--sizes", default="1,10", help="multiples of the library's source")
    parser.add_argument("--repetitions", type=int, default=3)
    args = parser.parse_args()
    where = machine()
    with tempfile.TemporaryDirectory(prefix="m-", dir="/tmp") as folder, _cluster(folder) as env:
        measured = [
            _measure(int(size), args.repetitions, Path(folder), env)
            for size in args.sizes.split(",")
        ]
    print(table([_row(size) for size in measured]))
    if args.json:
        ratios = {f"ratio_wall_{one['size']}x": one["ratio"] for one in measured}
        write_json(args.json, {"machine": where, "sizes": measured, **ratios})


@contextlib.contextmanager
def _cluster(folder: str) -> Iterator[dict[str, str]]:
    """The environment of a client of a local cluster that lives as long as the block."""
    token = Path(folder, "token")
    token.write_text(os.urandom(32).hex())
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_TMPDIR": folder}
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD_CLUSTER],
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    words = (line.split() for line in holder.stdout or ())
    address = next((line[1] for line in words if line[:1] == ["address"]), None)
    if address is None:
        sys.exit("the cluster did not start")
    try:
        yield {**env, "RAY_ADDRESS": address}
    finally:
        holder.communicate()  # closes its stdin: it ends, and its cluster with it


def _measure(size: int, repetitions: int, folder: Path, env: dict[str, str]) -> dict[str, Any]:
    config = _config(size, folder)
    seconds: dict[str, list[float]] = {"manta": [], "plain": []}
    for number in range(repetitions):
        output = folder / f"{size}x-{number}"
        manta = [sys.executable, str(REPOSITORY / "jobs" / "prepare.py"), "--config", str(config)]
        plain = [sys.executable, str(Path(__file__).with_name("plain_prepare.py")), str(config)]
        env |= {storage.ROOT_VARIABLE: str(output / "manta")}
        seconds["manta"].append(_seconds(manta, env))
        seconds["plain"].append(_seconds([*plain, str(output / "plain")], env))
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "size": size,
        "input_bytes": sum(
            file.size_bytes for file in text.list_inputs(spec.load(config, spec.PrepareConfig))
        ),
        "seconds": seconds,
        "median_seconds": medians,
        "ratio": medians["manta"] / medians["plain"],
    }


def _config(size: int, folder: Path) -> Path:
    """The default config over `size` variants of the library's files."""
    if size == 1:
        return CONFIG
    source = folder / f"source-{size}"
    source.mkdir()
    for number, file in enumerate(text.list_inputs(spec.PrepareConfig(name="source"))):
        data = Path(file.url).read_bytes()
        for variant in range(size):
            (source / f"{number}-{variant}.py").write_bytes(b"# variant %d\n" % variant + data)
    values = yaml.safe_load(CONFIG.read_text()) | {"inputs": [str(source)]}
    path = folder / f"{size}x.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def _seconds(command: list[str], env: dict[str, str]) -> float:
    started = time.monotonic()
    subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - started


def _row(one: dict[str, Any]) -> dict[str, str]:
    return {
        "input": f"{one['input_bytes'] / 1e6:.1f} MB",
        "jobs/prepare.py": f"{one['median_seconds']['manta']:.1f} s",
        "one process": f"{one['median_seconds']['plain']:.1f} s",
        "ratio": f"{one['ratio']:.2f}",
    }


if __name__ == "__main__":
    main()
