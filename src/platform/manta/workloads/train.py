"""One training run under Ray Train: check, fit, and say what came of it."""

from __future__ import annotations

import os
from typing import Any

import yaml

from manta import storage
from manta.errors import InputError, MantaError
from manta.spec import ScalingConfig, TrainConfig
from manta.workloads import checkpoints, history, layout, session
from manta.workloads import job as jobs
from manta.workloads.checkpoints import Checkpoint
from manta.workloads.entry import measured, progress
from manta.workloads.job import Job


def train(config: TrainConfig) -> dict[str, str]:
    """Train as `config` says, or go on where a run of that name stopped; artifact → URL.

    Raises:
        InputError: the config does not fit the dataset, the cluster, or a checkpoint of the run.
        MantaError: training failed more often than `scaling.max_failures`.
    """
    job = jobs.prepare(with_tuned(config))
    checkpoint = _newest(job)
    if checkpoint is not None and _is_finished(job, checkpoint):
        progress(f"run `{config.name}` is finished already; its model is as it was")
    else:
        _fit(job, checkpoint)
        _draw(job)
    measured(**storage.read_seal(job.model_url, "model").get("metrics", {}))
    return {
        "model": job.model_url,
        "run": job.run_url,
        "metrics": storage.join(job.run_url, history.FILE),
        "loss curve": _curve_url(job),
    }


def with_tuned(config: TrainConfig) -> TrainConfig:
    """`config` with the best parameters of the search it names. Raises InputError if none."""
    if config.tuned is None:
        return config
    url = storage.join(layout.tuning(config.tuned), "best.yaml")
    if not storage.exists(url):
        raise InputError(
            f"search `{config.tuned}` has no {url}",
            "run jobs/tune.py with that name first, or remove `tuned`",
        )
    best = yaml.safe_load(storage.read_bytes(url))
    progress("tuned: " + ", ".join(f"{key} = {value}" for key, value in best.items()))
    return jobs.override(config, best)


def _newest(job: Job) -> Checkpoint | None:
    """What the run goes on from. Raises InputError if it is of another configuration."""
    checkpoint, skipped = checkpoints.newest(job.run_url)
    for line in skipped:
        progress(f"warning: {line}")
    if checkpoint is not None:
        checkpoints.refuse_other(checkpoint, job.identity, job.config.name, job.run_url)
    return checkpoint


def _is_finished(job: Job, checkpoint: Checkpoint) -> bool:
    """Whether nothing is left to do: the last checkpoint, the curve and this config's model."""
    if checkpoint.step < job.config.num_steps or not storage.exists(_curve_url(job)):
        return False
    try:
        seal = storage.read_seal(job.model_url, "model")
    except InputError:
        return False
    return all(seal.get(key) == job.facts[key] for key in ("dataset", "config"))


def check_resources(scaling: ScalingConfig) -> None:
    """Raise InputError if the cluster can never hold the workers: Ray would wait for ever.

    A cluster that autoscales may grow, so its configured limits count instead of its nodes.
    """
    import ray
    from ray._private.state import state

    wanted = {"CPU": scaling.cpus_per_worker, "GPU": scaling.gpus_per_worker}
    wanted = {key: value for key, value in wanted.items() if value}
    limits = state.get_max_resources_from_cluster_config()
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if limits is not None:
        nodes = [limits]
    room = sum(int(min(node.get(key, 0) // n for key, n in wanted.items())) for node in nodes)
    if room < scaling.num_workers:
        has = ", ".join(f"{sum(n.get(key, 0) for n in nodes):g} {key}" for key in wanted)
        each = ", ".join(f"{value:g} {key}" for key, value in wanted.items())
        raise InputError(
            f"{scaling.num_workers} workers of {each} do not fit the cluster, which has {has}",
            f"write scaling.num_workers: {max(room, 1)}, or give a worker less",
        )
    free = ray.available_resources()
    short = [key for key, n in wanted.items() if free.get(key, 0) < n * scaling.num_workers]
    if short:
        progress(f"waiting until enough {' and '.join(short)} of the cluster is free")


def _fit(job: Job, checkpoint: Checkpoint | None) -> None:
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # a report waits for it
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # it prints every line twice
    session.connect()
    check_resources(job.config.scaling)
    from ray.train import TrainingFailedError

    checkpoints.sweep(job.run_url, kept=checkpoint)
    progress(f"starting {job.config.scaling.num_workers} workers for run `{job.config.name}`")
    try:
        _trainer(job).fit()
    except TrainingFailedError as error:
        raise explain(error) from error
    checkpoints.sweep(job.run_url)


def _trainer(job: Job) -> Any:
    from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig
    from ray.train import ScalingConfig as RayScalingConfig
    from ray.train.torch import TorchTrainer

    from manta.workloads.worker import train_worker

    scaling = job.config.scaling
    resources = {"CPU": scaling.cpus_per_worker, "GPU": scaling.gpus_per_worker}
    filesystem, path = storage.arrow_filesystem(job.run_url.rpartition("/")[0])
    return TorchTrainer(
        train_worker,
        train_loop_config={"job": job},
        scaling_config=RayScalingConfig(
            num_workers=scaling.num_workers,
            use_gpu=scaling.gpus_per_worker > 0,
            resources_per_worker={key: value for key, value in resources.items() if value},
        ),
        run_config=RunConfig(
            name=job.config.name,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=scaling.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=job.config.num_checkpoints_kept),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )


def explain(error: Exception) -> MantaError:
    """One line for what made Ray Train give up: our own message if a worker raised one."""
    failures = [
        getattr(failure, "_base_exc", failure)
        for failure in getattr(error, "worker_failures", {}).values()
    ]
    own = [failure for failure in failures if isinstance(failure, MantaError)]
    if own:
        return own[0]
    cause = failures[0] if failures else getattr(error, "controller_failure", error)
    line = next((line for line in reversed(str(cause).splitlines()) if line.strip()), "")
    return MantaError(
        f"training failed: {type(cause).__name__}: {line.strip()}",
        "the log above has more; started again, the run goes on from its last checkpoint",
    )


def _draw(job: Job) -> None:
    records = history.load(job.run_url, job.config.num_steps)
    history.draw(_curve_url(job), records, f"training run {job.config.name}")


def _curve_url(job: Job) -> str:
    return storage.join(job.run_url, "loss.png")
