"""What is in a checkpoint: weights, optimizer and random state, written and loaded by workers."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from manta import storage
from manta.workloads import step as stepping
from manta.workloads.checkpoints import Checkpoint, Identity


def write(
    folder: Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    identity: Identity,
) -> None:
    """Write this worker's part of a checkpoint into a local folder; all workers call it."""
    rank, num_workers = _rank(), _num_workers()
    weights, optimizer_state = get_state_dict(stepping.unwrapped(module), optimizer)
    state = {"model": weights, "optimizer": optimizer_state}
    dcp.save(state, checkpoint_id=folder, no_dist=num_workers == 1)
    torch.save(random_state(), folder / f"random-{rank}.pt")
    files = {path.name: storage.fingerprint_file(str(path)) for path in sorted(folder.iterdir())}
    facts = {"step": step, "num_workers": num_workers, "identity": identity, "files": files}
    storage.write_json(str(folder / f"manifest-{rank}.json"), facts)


def restore(checkpoint: Checkpoint, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load weights, optimizer and this worker's random state in place; all workers call it."""
    module = stepping.unwrapped(module)
    weights, optimizer_state = get_state_dict(module, optimizer)
    state = {"model": weights, "optimizer": optimizer_state}
    with _local(checkpoint.url) as folder:
        dcp.load(state, checkpoint_id=folder, no_dist=_num_workers() == 1)
        own = folder / f"random-{_rank()}.pt"
        set_state_dict(
            module,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        if own.exists():  # absent for a worker that the saving run did not have
            set_random_state(torch.load(own, weights_only=False))


def random_state() -> dict[str, Any]:
    """State of every random generator of this process that training may draw from."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put the generators where `random_state` found them."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _num_workers() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def _local(url: str) -> Iterator[Path]:
    filesystem, path = storage.filesystem(url)
    if storage.is_local(url):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="manta-") as folder:
        for file in filesystem.find(path):
            filesystem.get_file(file, str(Path(folder, Path(file).name)))
        yield Path(folder)
