"""Training batches through Ray Data, from any position, in an order that a restart repeats.

Each worker runs a stream of its own blocks, because a split of one stream is dealt out as workers
ask for it, and that differs between runs. Stream tasks ask for no CPU, so that training workers
may hold all of a cluster's; they read ahead as far as `READ_AHEAD_CHUNKS`.

Consequence: a worker's stream reads the windows of row groups that its chunk touches, and uses
its own share of their rows. With W workers the Parquet files are decoded up to W times. In
exchange the batch of a step is the same for every number of workers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from manta.workloads import blocks as blocks_
from manta.workloads.blocks import Blocks

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

CHUNK_STEPS = 16
READ_AHEAD_CHUNKS = 4
SEGMENT_CHUNKS = 256  # one Ray Data execution; bounds its bookkeeping in a long run


@dataclass(frozen=True, kw_only=True)
class Share:
    """Which blocks a worker trains on: of each global batch, its contiguous part."""

    blocks: Blocks
    seed: int
    global_batch_size: int
    micro_batch_size: int
    rank: int
    num_workers: int

    @property
    def rows_per_step(self) -> int:
        """Blocks a worker takes for one optimizer step."""
        return self.global_batch_size // self.num_workers

    def read(self, start: int, stop: int) -> NDArray[np.int32]:
        """This worker's blocks of steps [start, stop), int32 [rows, sequence_length]."""
        size = self.global_batch_size
        rows = blocks_.shuffled(self.blocks, self.seed, start * size, stop * size)
        rows = rows.reshape(stop - start, size, -1)
        first = self.rank * self.rows_per_step
        mine = rows[:, first : first + self.rows_per_step]
        return mine.reshape(-1, self.blocks.sequence_length)


def micro_batches(share: Share, start: int, stop: int) -> Iterator[list[torch.Tensor]]:
    """For each step of [start, stop): this worker's micro-batches, int32 [rows, length]."""
    passes = share.rows_per_step // share.micro_batch_size
    segment = CHUNK_STEPS * SEGMENT_CHUNKS
    for first in range(start, stop, segment):
        batches = _stream(share, first, min(first + segment, stop))
        for step in range(first, min(first + segment, stop)):
            parts = [next(batches) for _ in range(passes)]
            assert all(int(part["step"][0]) == step for part in parts), "stream out of order"
            yield [part[blocks_.COLUMN] for part in parts]


def _stream(share: Share, start: int, stop: int) -> Iterator[dict[str, torch.Tensor]]:
    import ray

    chunks = [
        {"start": first, "stop": min(first + CHUNK_STEPS, stop)}
        for first in range(start, stop, CHUNK_STEPS)
    ]
    dataset = ray.data.from_items(chunks, override_num_blocks=len(chunks)).map_batches(
        _ReadChunk(share), batch_size=1, num_cpus=0, compute=ray.data.TaskPoolStrategy(size=1)
    )
    _configure(dataset, share)
    batches: Iterator[dict[str, Any]] = iter(
        dataset.iter_torch_batches(batch_size=share.micro_batch_size, prefetch_batches=2)
    )
    return batches


def _configure(dataset: Any, share: Share) -> None:
    from ray.data import ExecutionResources

    chunk_bytes = CHUNK_STEPS * share.rows_per_step * share.blocks.sequence_length * 4
    options = dataset.context.execution_options
    options.preserve_order = True
    options.resource_limits = ExecutionResources.for_limits(
        object_store_memory=max(READ_AHEAD_CHUNKS * chunk_bytes, 64 * 2**20)
    )
    dataset.context.enable_progress_bars = False


@dataclass(frozen=True)
class _ReadChunk:
    share: Share

    def __call__(self, chunk: dict[str, NDArray[np.int64]]) -> dict[str, NDArray[Any]]:
        start, stop = int(chunk["start"][0]), int(chunk["stop"][0])
        steps = np.repeat(np.arange(start, stop), self.share.rows_per_step)
        return {blocks_.COLUMN: self.share.read(start, stop), "step": steps}
