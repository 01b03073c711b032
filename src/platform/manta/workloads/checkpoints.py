"""Checkpoints of a training run: what is in one, whether it is whole, and which to go on from.

A checkpoint is a folder `checkpoint_STEP_ID` in the run's folder. Weights and optimizer are in
PyTorch's distributed checkpoint format, one file a worker, so that another number of workers can
load them. Beside them each worker has its random state and a manifest with the size and SHA-256 of
its files. The schedule and the data position are functions of the step, which is in the manifest.
"""

from __future__ import annotations

import random
import re
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from manta import storage
from manta.errors import InputError
from manta.workloads import step as stepping

NAME = re.compile(r"checkpoint_(\d{8})_[0-9a-f]{8}")
REGISTRY = "checkpoint_manager_snapshot.json"  # Ray Train 2.60 writes it into the run's folder
Identity = dict[str, Any]
"""Dotted name → value of what a checkpoint must share with the run that loads it."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: its folder, and the optimizer steps it has behind it."""

    url: str
    step: int
    num_workers: int
    identity: Identity


class Damaged(Exception):
    """A checkpoint's folder is not a whole checkpoint; the message says why."""


def new_name(step: int) -> str:
    """A folder name that no other attempt uses: Ray deletes old checkpoints by name."""
    return f"checkpoint_{step:08d}_{uuid.uuid4().hex[:8]}"


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


def newest(run_url: str) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint of a run, and one line for each newer one that is not whole.

    A run that was killed while it uploaded leaves such a folder; so does a damaged disk.
    """
    skipped: list[str] = []
    for name in reversed(names(run_url)):
        url = storage.join(run_url, name)
        try:
            return verify(url), skipped
        except Damaged as error:
            skipped.append(f"checkpoint {url} is not whole ({error}) and is passed over")
    return None, skipped


def names(run_url: str) -> list[str]:
    """Names of a run's checkpoint folders, whole or not, oldest step first."""
    filesystem, path = storage.filesystem(run_url)
    if not filesystem.exists(path):
        return []
    found = (
        str(name).rstrip("/").rpartition("/")[2] for name in filesystem.ls(path, detail=False)
    )
    return sorted(name for name in found if NAME.fullmatch(name))


def verify(url: str) -> Checkpoint:
    """Read every file of the checkpoint at `url`. Raises Damaged if one is missing or differs."""
    first = _manifest(url, 0)
    manifests = [first, *(_manifest(url, rank) for rank in range(1, first["num_workers"]))]
    for manifest in manifests:
        for name, expected in manifest["files"].items():
            _compare(storage.join(url, name), expected)
    return Checkpoint(url, first["step"], first["num_workers"], first["identity"])


def sweep(run_url: str, kept: Checkpoint | None = None) -> None:
    """Delete checkpoints that are neither `kept` nor in Ray Train's registry.

    Ray keeps to `num_checkpoints_kept` only among those it registered; a kill between upload and
    registration leaves one more. If a registered one is gone, Ray could not start: the registry
    is deleted, and `newest` still finds what is there.
    """
    registry = storage.join(run_url, REGISTRY)
    found = names(run_url)
    registered = _registered(registry)
    if not registered <= set(found):
        storage.delete(registry)
        registered = set()
    for name in found:
        url = storage.join(run_url, name)
        if name not in registered and (kept is None or url != kept.url):
            storage.delete(url)


def _registered(registry: str) -> set[str]:
    if not storage.exists(registry):
        return set()
    results = storage.read_json(registry)["checkpoint_results"]
    return {str(result["checkpoint_dir_name"]) for result in results}


def refuse_other(checkpoint: Checkpoint, identity: Identity, name: str, run_url: str) -> None:
    """Raise InputError if the checkpoint is of another model, dataset or schedule."""
    changed = differences(checkpoint.identity, identity)
    if changed:
        raise InputError(
            f"run `{name}` has a checkpoint of another configuration: {'; '.join(changed)}",
            f"give the run another name, or delete {run_url} to start it afresh",
        )


def differences(before: Identity, now: Identity) -> list[str]:
    """One phrase for each name whose value is not the same."""
    keys = sorted(before.keys() | now.keys())
    return [
        f"{key} was {before.get(key)}, now {now.get(key)}"
        for key in keys
        if before.get(key) != now.get(key)
    ]


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


def _manifest(url: str, rank: int) -> dict[str, Any]:
    name = f"manifest-{rank}.json"
    try:
        content: dict[str, Any] = storage.read_json(storage.join(url, name))
    except InputError:
        raise Damaged(f"{name} is missing or cut short") from None
    return content


def _compare(url: str, expected: dict[str, Any]) -> None:
    name = url.rpartition("/")[2]
    try:
        found = storage.fingerprint_file(url)
    except InputError:
        raise Damaged(f"{name} is missing") from None
    if found != expected:
        raise Damaged(f"{name} is not what was written")


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
