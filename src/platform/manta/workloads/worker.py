"""What each Ray Train worker runs: build, resume, step, measure, checkpoint, export."""

from __future__ import annotations

import logging
import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
import transformers
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from manta import storage
from manta.errors import MantaError
from manta.workloads import blocks, checkpoints, export, history, ingest, peak, state
from manta.workloads import model as modeling
from manta.workloads import step as stepping
from manta.workloads.history import Record
from manta.workloads.job import Job


def train_worker(settings: dict[str, Any]) -> Record:
    """Ray Train's entry on every worker; `settings["job"]` is a Job. Returns the last metrics."""
    job: Job = settings["job"]
    _be_quiet()
    torch.set_num_threads(max(1, int(job.config.scaling.cpus_per_worker)))
    worker = _Worker(job)
    start = worker.resume()
    share = worker.share()
    batches = ingest.micro_batches(share, start, job.config.num_steps)
    for step, micro_batches in enumerate(worker.timed(batches), start):
        worker.step(step, micro_batches)
    worker.export()
    return history.latest(worker.records)


@dataclass
class _Meter:
    """Wall time of the steps since the last report; validation and checkpoints do not count."""

    num_steps: int = 0
    elapsed_s: float = 0.0
    began: float = field(default_factory=time.perf_counter)

    def stop(self) -> None:
        self.elapsed_s += time.perf_counter() - self.began

    def start(self) -> None:
        self.began = time.perf_counter()

    def reset(self) -> None:
        self.num_steps, self.elapsed_s = 0, 0.0


class _Worker:
    def __init__(self, job: Job) -> None:
        config = job.config
        context = ray.train.get_context()
        self.job, self.config = job, config
        self.rank, self.num_workers = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # NCCL's object collectives go there
        self.dtype = stepping.resolve_dtype(config.precision, self.device)
        token_ids = export.token_ids(job.dataset_url)
        self.model = modeling.build(config.model, job.vocab_size, config.seed, token_ids)
        self.flops_per_token = self._flops_per_token()
        module = stepping.parallelize(
            modeling.CausalLoss(self.model), config.scaling.parallel, self.device, self.dtype
        )
        self.stepper = stepping.Stepper(
            module,
            stepping.build_optimizer(module, config.optimizer),
            config.optimizer,
            num_steps=config.num_steps,
            device=self.device,
            dtype=self.dtype,
        )
        torch.manual_seed(config.seed + self.rank)  # after the build, which is alike everywhere
        self.records: list[Record] = []
        self.meter = _Meter()

    def resume(self) -> int:
        """Load the newest whole checkpoint; returns the steps it has behind it."""
        checkpoint = self._agree_on_checkpoint()
        if checkpoint is None:
            self._say(f"starting at step 0 of {self.config.num_steps}")
            return 0
        state.restore(checkpoint, self.stepper.module, self.stepper.optimizer)
        self.records = history.load(self.job.run_url, checkpoint.step)
        self._say(f"going on from step {checkpoint.step} of {self.config.num_steps}")
        return checkpoint.step

    def share(self) -> ingest.Share:
        """This worker's part of the training blocks."""
        return ingest.Share(
            blocks=self.job.train,
            seed=self.config.seed,
            global_batch_size=self.config.global_batch_size,
            micro_batch_size=self.config.micro_batch_size,
            rank=self.rank,
            num_workers=self.num_workers,
        )

    def timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        """`batches`, with the wait for each counted as step time."""
        self.meter.start()
        for batch in batches:
            yield batch
            self.meter.start()

    def step(self, step: int, micro_batches: list[torch.Tensor]) -> None:
        """One optimizer step, and what is due after it."""
        result = self.stepper.step(step, micro_batches)
        done = step + 1
        saves = self._due(done, self.config.checkpoint_every_steps)
        validates = self._due(done, self.config.validate_every_steps)
        self.meter.num_steps += 1
        if saves or validates or self._due(done, self.config.log_every_steps):
            record = self._measure(done, result)
            if validates:
                record["validation_loss"] = self._validate()
            self._report(done, record, saves)
        else:
            self.meter.stop()

    def export(self) -> None:
        """Gather the weights, and write the model from rank 0."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        module = stepping.unwrapped(self.stepper.module)
        weights = get_model_state_dict(module, options=options)
        if self.rank == 0:
            metrics = history.latest(self.records)
            export.export(
                self.model,
                {name.removeprefix("model."): value for name, value in weights.items()},
                self.dtype,
                dataset_url=self.job.dataset_url,
                model_url=self.job.model_url,
                facts=self.job.facts | {"metrics": metrics},
            )
        _barrier()

    def _agree_on_checkpoint(self) -> checkpoints.Checkpoint | None:
        """Rank 0 looks, so that all workers load the same one."""
        found: list[Any] = [None]
        if self.rank == 0:
            checkpoint, skipped = checkpoints.newest(self.job.run_url)
            for line in skipped:
                self._say(f"warning: {line}")
            found = [checkpoint]
        if dist.is_initialized():
            dist.broadcast_object_list(found, src=0)
        checkpoint = found[0]
        assert checkpoint is None or isinstance(checkpoint, checkpoints.Checkpoint)
        return checkpoint

    def _due(self, done: int, every: int) -> bool:
        return done % every == 0 or done == self.config.num_steps

    def _measure(self, done: int, result: stepping.StepResult) -> Record:
        loss = _sum(result.loss) / self.num_workers  # waits for the device: read the clock after
        self.meter.stop()
        step_time_s = self.meter.elapsed_s / self.meter.num_steps
        self.meter.reset()
        tokens = self.config.global_batch_size * self.job.train.sequence_length
        record = {
            "step": done,
            "loss": loss,
            "learning_rate": result.learning_rate,
            "grad_norm": float(result.grad_norm),
            "step_time_s": step_time_s,
            "tokens_per_s": tokens / step_time_s,
        }
        return record | self._utilization(record["tokens_per_s"])

    def _utilization(self, tokens_per_s: float) -> Record:
        if self.device.type != "cuda" or self.dtype != torch.bfloat16:
            return {}
        most = peak.peak_flops(torch.cuda.get_device_name(self.device))
        if most is None:
            return {}
        return {"mfu": tokens_per_s * self.flops_per_token / (most * self.num_workers)}

    def _validate(self) -> float:
        """Mean loss over the validation blocks of all workers, in nats a token."""
        rows = blocks.first(self.job.validation, self.config.num_validation_sequences)
        mine = torch.from_numpy(rows[self.rank :: self.num_workers])
        passes = math.ceil(math.ceil(len(rows) / self.num_workers) / self.config.micro_batch_size)
        parts = torch.tensor_split(mine, passes)  # the same number everywhere: a pass may gather
        total, count = self.stepper.evaluate(parts)
        return _sum(torch.tensor(total)) / _sum(torch.tensor(float(count)))

    def _report(self, done: int, record: Record, saves: bool) -> None:
        self.records.append(record)
        if self.rank == 0:
            self._say(_progress(record, self.config.num_steps))
            history.save(self.job.run_url, self.records)
        if not saves:
            ray.train.report(record)
            return
        with tempfile.TemporaryDirectory(prefix="manta-") as folder:
            self._write_checkpoint(Path(folder), done)
            with storage.explain_errors(self.job.run_url):
                ray.train.report(
                    record,
                    checkpoint=ray.train.Checkpoint.from_directory(folder),
                    checkpoint_dir_name=checkpoints.new_name(done),  # rank 0's is taken by all
                )

    def _write_checkpoint(self, folder: Path, done: int) -> None:
        try:
            state.write(
                folder, self.stepper.module, self.stepper.optimizer, done, self.job.identity
            )
        except Exception as error:  # torch wraps a full disk in errors of several types
            raise MantaError(
                f"cannot write the checkpoint of step {done}: {_first_line(error)}",
                "free some space and start the run again; it goes on from the one before",
            ) from error

    def _flops_per_token(self) -> float:
        return peak.flops_per_token(
            modeling.num_multiplied_parameters(self.model),
            self.config.model.num_hidden_layers,
            self.config.model.hidden_size,
            self.job.train.sequence_length,
        )

    def _say(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)


def _progress(record: Record, num_steps: int) -> str:
    left_s = (num_steps - record["step"]) * record["step_time_s"]
    parts = [f"step {record['step']}/{num_steps}", f"loss {record['loss']:.3f}"]
    if "validation_loss" in record:
        parts.append(f"validation loss {record['validation_loss']:.3f}")
    parts += [f"{record['tokens_per_s']:,.0f} tokens/s", f"{left_s:.0f} s left"]
    return " · ".join(parts)


def _sum(value: torch.Tensor) -> float:
    value = value.clone()
    if dist.is_initialized():
        value = value.to(ray.train.torch.get_device())
        dist.all_reduce(value)
    return float(value)


def _be_quiet() -> None:
    """Drop what libraries say at INFO in every worker: each report, each Ray Data execution."""
    logging.disable(logging.INFO)
    transformers.utils.logging.disable_progress_bar()


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
