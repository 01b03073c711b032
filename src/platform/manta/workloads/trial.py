"""One short training run of a search: the step of a real run, on one worker, without Ray Train."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from ray import tune

from manta.spec import TrainConfig
from manta.workloads import blocks, export, ingest
from manta.workloads import job as jobs
from manta.workloads import model as modeling
from manta.workloads import step as stepping
from manta.workloads.job import Job

METRIC = "validation_loss"


def run_trial(parameters: dict[str, Any], job: Job, report_every: int) -> None:
    """Train with `parameters` (dotted key → value) over the job's config, reporting as it goes."""
    transformers.utils.logging.disable_progress_bar()
    config = jobs.override(job.config, parameters)
    torch.set_num_threads(max(1, int(config.scaling.cpus_per_worker)))
    stepper = _stepper(job, config)
    held_out = torch.from_numpy(blocks.first(job.validation, job.config.num_validation_sequences))
    for step, micro_batches in enumerate(_batches(job, config)):
        result = stepper.step(step, micro_batches)
        done = step + 1
        if done % report_every == 0 or done == config.num_steps:
            total, count = stepper.evaluate(held_out.split(config.micro_batch_size))
            tune.report(
                {
                    "step": done,
                    "loss": float(result.loss),
                    METRIC: _or_worst(total / count),
                }
            )


def _stepper(job: Job, config: TrainConfig) -> stepping.Stepper:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = stepping.resolve_dtype(config.precision, device)
    token_ids = export.token_ids(job.dataset_url)
    model = modeling.build(config.model, job.vocab_size, config.seed, token_ids)
    module = stepping.parallelize(modeling.CausalLoss(model), "ddp", device, dtype)
    return stepping.Stepper(
        module,
        stepping.build_optimizer(module, config.optimizer),
        config.optimizer,
        num_steps=config.num_steps,
        device=device,
        dtype=dtype,
    )


def _batches(job: Job, config: TrainConfig) -> Iterator[list[torch.Tensor]]:
    share = ingest.Share(
        blocks=job.train,
        seed=config.seed,
        global_batch_size=config.global_batch_size,
        micro_batch_size=config.micro_batch_size,
        rank=0,
        num_workers=1,
    )
    for first in range(0, config.num_steps, ingest.CHUNK_STEPS):
        stop = min(first + ingest.CHUNK_STEPS, config.num_steps)
        rows = torch.from_numpy(share.read(first, stop))
        for batch in rows.split(config.global_batch_size):
            yield list(batch.split(config.micro_batch_size))


def _or_worst(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf  # the search could not order a NaN
