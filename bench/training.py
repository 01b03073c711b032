"""Training under Ray Train beside the same loop under torchrun.

Both take the same steps on the same batches with the same code, two workers over gloo, then write
a checkpoint and export the model. Step time is the median over intervals of INTERVAL steps, the
first left out; launch to exit is the wall time of the command. The Ray cluster is up before, as it
is for a user; its start is reported apart.

    python bench/training.py [--json FILE] [--repetitions N]
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from common import machine, table, write_json

PROJECT = Path(__file__).parents[1]
NUM_WORKERS, NUM_STEPS, INTERVAL = 2, 40, 5
LENGTH, VOCABULARY, NUM_ROWS = 128, 1024, 2000
CONFIG: dict[str, Any] = {
    "name": "bench",
    "dataset": "bench",
    "num_steps": NUM_STEPS,
    "global_batch_size": 8,
    "micro_batch_size": 4,
    "checkpoint_every_steps": NUM_STEPS,
    "validate_every_steps": NUM_STEPS,
    "num_validation_sequences": 8,
    "log_every_steps": INTERVAL,
    "model": {"hidden_size": 128, "intermediate_size": 344},
    "scaling": {"num_workers": NUM_WORKERS},
}
HOLD = (
    "import ray, sys;"
    f"info = ray.init(num_cpus={NUM_WORKERS}, include_dashboard=False).address_info;"
    "print(info['gcs_address'], flush=True); sys.stdin.read()"
)


def main() -> None:
    """Run both, alternately, and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--worker", metavar="CONFIG", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker)
        return
    result = measure(args.repetitions)
    print(table(summary(result)))
    print(f"step time ratio {result['ratio_step_time']:.3f}")
    print(f"launch-to-exit ratio {result['ratio_launch_to_exit']:.3f}")
    if args.json:
        write_json(args.json, result)


def measure(repetitions: int) -> dict[str, Any]:
    """Each repetition of both, and the medians of their ratios (Ray Train over torchrun)."""
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="m-") as folder:
        environment = isolated_environment(Path(folder))
        write_dataset(environment["MANTA_STORAGE"])
        began = time.perf_counter()
        with cluster(environment) as address:
            cluster_start_s = time.perf_counter() - began
            for number in range(repetitions):
                file = Path(folder, f"{number}.yaml")
                file.write_text(yaml.safe_dump(CONFIG | {"name": f"bench-{number}"}))
                runs.append(
                    {
                        "ray_train": timed_ray(file, environment, address),
                        "torchrun": timed_torchrun(file, environment),
                    }
                )
    return {
        "machine": machine(),
        "config": CONFIG,
        "cluster_start_s": cluster_start_s,
        "repetitions": runs,
        "ratio_step_time": ratio(runs, "step_time_s"),
        "ratio_launch_to_exit": ratio(runs, "launch_to_exit_s"),
    }


def isolated_environment(folder: Path) -> dict[str, str]:
    """Variables of a cluster and a storage root of the measurement's own."""
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return {
        **inherited,
        "MANTA_STORAGE": str(folder / "storage"),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_TMPDIR": str(folder),
    }


def summary(result: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each launcher and repetition."""
    return [
        {"repetition": number, "launcher": name, **{k: f"{v:.3f}" for k, v in times.items()}}
        for number, run in enumerate(result["repetitions"])
        for name, times in run.items()
    ]


def ratio(runs: list[dict[str, Any]], key: str) -> float:
    """Median over repetitions of Ray Train's figure over torchrun's."""
    ratios = [run["ray_train"][key] / run["torchrun"][key] for run in runs]
    return float(statistics.median(ratios))


def timed_ray(file: Path, environment: dict[str, str], address: str) -> dict[str, float]:
    """`python jobs/train.py` on the running cluster."""
    command = [sys.executable, str(PROJECT / "jobs" / "train.py"), "--config", str(file)]
    seconds = timed(command, environment | {"RAY_ADDRESS": address})
    metrics = Path(environment["MANTA_STORAGE"], "train", file_name(file), "metrics.jsonl")
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    times = [record["step_time_s"] for record in records[1:]]
    return {"step_time_s": statistics.median(times), "launch_to_exit_s": seconds}


def timed_torchrun(file: Path, environment: dict[str, str]) -> dict[str, float]:
    """The loop in `worker` below, under torchrun."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, f"--nproc-per-node={NUM_WORKERS}", __file__, "--worker", str(file)]
    seconds = timed(command, environment)
    times = json.loads(file.with_suffix(".times.json").read_text())
    return {"step_time_s": statistics.median(times[1:]), "launch_to_exit_s": seconds}


def timed(command: list[str], environment: dict[str, str]) -> float:
    """Wall seconds of a command; its output is shown if it fails."""
    began = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - began
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return seconds


def file_name(file: Path) -> str:
    """Name of the run that a config file is for."""
    name = yaml.safe_load(file.read_text())["name"]
    assert isinstance(name, str)
    return name


@contextmanager
def cluster(environment: dict[str, str]) -> Iterator[str]:
    """A Ray cluster of this machine for the time of the block; its address."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert holder.stdout is not None
    yield holder.stdout.readline().strip()
    holder.communicate()


def write_dataset(root: str) -> None:
    """Random token blocks under `root`, with a tokenizer, sealed like a prepared dataset."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from manta import storage

    folder = Path(root, "datasets", "bench", "v1")
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (NUM_ROWS, LENGTH), dtype=np.int32)
    for split, rows in (("train", tokens[50:]), ("validation", tokens[:50])):
        (folder / split).mkdir(parents=True)
        column = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), LENGTH)
        pq.write_table(pa.table({"input_ids": column}), folder / split / "0.parquet")
    vocabulary = {f"t{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="t0")
    fast.save_pretrained(str(folder / "tokenizer"))
    facts = {"version": "v1", "sequence_length": LENGTH, "vocab_size": VOCABULARY}
    (folder / "manifest.json").write_text(json.dumps(facts))
    storage.seal(str(folder))
    (folder.parent / "LATEST").write_text("v1")


def worker(config_file: str) -> None:
    """The loop without Ray: what torchrun starts twice."""
    import torch
    import torch.distributed as dist

    from manta import spec
    from manta.workloads import export, ingest
    from manta.workloads import job as jobs
    from manta.workloads import model as modeling
    from manta.workloads import step as stepping

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    job = jobs.prepare(spec.load(config_file, spec.TrainConfig))
    config, device = job.config, torch.device("cpu")
    ids = export.token_ids(job.dataset_url)
    model = modeling.build(config.model, job.vocab_size, config.seed, ids)
    module = stepping.parallelize(modeling.CausalLoss(model), "ddp", device, torch.float32)
    stepper = stepping.Stepper(
        module,
        stepping.build_optimizer(module, config.optimizer),
        config.optimizer,
        num_steps=config.num_steps,
        device=device,
    )
    share = ingest.Share(
        blocks=job.train,
        seed=config.seed,
        global_batch_size=config.global_batch_size,
        micro_batch_size=config.micro_batch_size,
        rank=dist.get_rank(),
        num_workers=dist.get_world_size(),
    )
    times = run_steps(stepper, share, config.num_steps)
    finish(job, model, stepper, times, config_file)
    dist.destroy_process_group()


def run_steps(stepper: Any, share: Any, num_steps: int) -> list[float]:
    """Mean step seconds of each interval."""
    import torch
    import torch.distributed as dist

    times: list[float] = []
    began = time.perf_counter()
    for step in range(num_steps):
        batch = torch.from_numpy(share.read(step, step + 1))
        result = stepper.step(step, list(batch.split(share.micro_batch_size)))
        if (step + 1) % INTERVAL == 0:
            dist.all_reduce(result.loss)
            times.append((time.perf_counter() - began) / INTERVAL)
            began = time.perf_counter()
    return times


def finish(job: Any, model: Any, stepper: Any, times: list[float], config_file: str) -> None:
    """Checkpoint and export, as the run under Ray does."""
    import torch
    import torch.distributed as dist

    from manta.workloads import export, state

    with tempfile.TemporaryDirectory(prefix="m-") as folder:
        state.write(Path(folder), stepper.module, stepper.optimizer, NUM_STEPS, job.identity)
    if dist.get_rank() == 0:
        weights = {name: value.cpu() for name, value in model.state_dict().items()}
        export.export(
            model,
            weights,
            torch.float32,
            dataset_url=job.dataset_url,
            model_url=job.model_url + "-torchrun",
            facts=job.facts,
        )
        Path(config_file).with_suffix(".times.json").write_text(json.dumps(times))
    dist.barrier()


if __name__ == "__main__":
    main()
