"""Checkpoints of a training run: what is in one, whether it is whole, and which to go on from.

A checkpoint is a folder `checkpoint_STEP_ID` in the run's folder. Weights and optimizer are in
PyTorch's distributed checkpoint format, one file a worker, so that another number of workers can
load them. Beside them each worker has its random state and a manifest with the size and SHA-256 of
its files. The schedule and the data position are functions of the step, which is in the manifest.
"""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass
from typing import Any

from manta import storage
from manta.errors import InputError

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
