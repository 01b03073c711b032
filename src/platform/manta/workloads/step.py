"""One optimizer step of data-parallel training, in plain torch.

No Ray and nothing of Manta is imported here, so a step can be profiled on a machine that has only
torch: give `Stepper` any module whose forward takes token ids and returns a scalar loss.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn


class Hyperparameters(Protocol):
    """What the optimizer reads; `manta.spec.OptimizerConfig` has it."""

    @property
    def learning_rate(self) -> float: ...  # noqa: D102
    @property
    def min_learning_rate_ratio(self) -> float: ...  # noqa: D102
    @property
    def warmup_ratio(self) -> float: ...  # noqa: D102
    @property
    def weight_decay(self) -> float: ...  # noqa: D102
    @property
    def beta1(self) -> float: ...  # noqa: D102
    @property
    def beta2(self) -> float: ...  # noqa: D102
    @property
    def max_grad_norm(self) -> float: ...  # noqa: D102


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """One step: this worker's mean loss and the global gradient norm, still on the device."""

    loss: torch.Tensor
    grad_norm: torch.Tensor
    learning_rate: float


def scheduled_learning_rate(step: int, num_steps: int, hyper: Hyperparameters) -> float:
    """Linear warm-up, then cosine decay to `min_learning_rate_ratio`; `step` counts from 0."""
    num_warmup = round(hyper.warmup_ratio * num_steps)
    if step < num_warmup:
        return hyper.learning_rate * (step + 1) / num_warmup
    progress = (step - num_warmup) / max(1, num_steps - 1 - num_warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    floor = hyper.min_learning_rate_ratio
    return hyper.learning_rate * (floor + (1 - floor) * cosine)


def build_optimizer(module: nn.Module, hyper: Hyperparameters) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves vectors (norms, biases) undecayed."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": hyper.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=hyper.learning_rate,
        betas=(hyper.beta1, hyper.beta2),
        fused=True,  # one pass over the weights instead of a dozen, on CPUs as on GPUs
    )


def resolve_dtype(precision: str, device: torch.device) -> torch.dtype:
    """`auto` is bf16 on an accelerator that has it, else fp32."""
    if precision == "auto":
        fits = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if fits else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]


def parallelize(
    module: nn.Module, parallel: str, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """`module` on `device`, replicated (`ddp`) or sharded (`fsdp2`) over the process group.

    Without a process group the module is only moved. Sharding takes each layer of every
    nn.ModuleList as a unit, so that one layer's weights are gathered at a time.
    """
    module.to(device)
    if not dist.is_initialized():
        return module
    if parallel == "ddp":
        devices = [device] if device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(
            module, device_ids=devices, gradient_as_bucket_view=True
        )
    return _shard(module, device, dtype)


def _shard(module: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    half = dtype if dtype != torch.float32 else None
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32)
    lists = [child for child in module.modules() if isinstance(child, nn.ModuleList)]
    for layer in [layer for modules in lists for layer in modules]:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    sharded: nn.Module = fully_shard(module, mesh=mesh, mp_policy=policy)
    return sharded


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel; a sharded one is itself."""
    if isinstance(module, nn.parallel.DistributedDataParallel):
        inner = module.module
        assert isinstance(inner, nn.Module)
        return inner
    return module


class Stepper:
    """Optimizer steps and evaluation of one module; a collective when a process group exists.

    Args:
        module: from `parallelize`; forward(token ids) returns the mean loss of its rows.
        optimizer: over the module's parameters.
        hyper: schedule and clipping.
        num_steps: length of the schedule, in optimizer steps.
        device: where batches go.
        dtype: bfloat16 computes under autocast; parameters and optimizer stay float32.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        hyper: Hyperparameters,
        *,
        num_steps: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.module, self.optimizer, self.hyper = module, optimizer, hyper
        self.num_steps, self.device, self.dtype = num_steps, device, dtype

    def step(self, step: int, micro_batches: list[torch.Tensor]) -> StepResult:
        """Optimizer step number `step` (from 0) on micro-batches [rows, length] of equal size."""
        self.module.train()
        learning_rate = scheduled_learning_rate(step, self.num_steps, self.hyper)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=self.device)
        for i, batch in enumerate(micro_batches):
            with self._reduce_gradients(i == len(micro_batches) - 1):
                part = self._loss(self.module, batch) / len(micro_batches)
                part.backward()
            loss += part.detach()
        grad_norm = self._clip()
        self.optimizer.step()
        return StepResult(loss=loss, grad_norm=grad_norm, learning_rate=learning_rate)

    def evaluate(self, batches: Iterable[torch.Tensor]) -> tuple[float, int]:
        """Sum of the rows' losses and their number, over this worker's batches.

        An empty batch counts nothing, and runs all the same: sharded weights are gathered by all.
        """
        module = unwrapped(self.module).eval()  # replicas need no gradient reducer here
        total, count = torch.zeros((), device=self.device), 0
        with torch.no_grad():
            for batch in batches:
                rows = batch if len(batch) else batch.new_zeros((1, batch.shape[1]))
                total += self._loss(module, rows) * len(batch)
                count += len(batch)
        return float(total), count

    def _loss(self, module: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss: torch.Tensor = module(batch.to(self.device, torch.int64, non_blocking=True))
        return loss.float()

    @contextlib.contextmanager
    def _reduce_gradients(self, now: bool) -> Iterator[None]:
        """Exchange gradients between workers only in the last pass of an accumulation."""
        module: Any = self.module
        if hasattr(module, "set_requires_gradient_sync"):
            module.set_requires_gradient_sync(now)
            yield
        elif now or not hasattr(module, "no_sync"):
            yield
        else:
            with module.no_sync():
                yield

    def _clip(self) -> torch.Tensor:
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.hyper.max_grad_norm)
        whole: torch.Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        return whole
