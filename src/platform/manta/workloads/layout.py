"""Where each artifact lies under the storage root."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from manta import storage
from manta.errors import InputError


def dataset(name: str, version: str) -> str:
    """Folder of one version of a dataset."""
    return storage.join(storage.root(), "datasets", name, version)


def newest(name: str) -> str:
    """File that holds the newest version of dataset `name`."""
    return storage.join(storage.root(), "datasets", name, "LATEST")


def find_dataset(reference: str) -> str:
    """Folder of `NAME` (its newest version) or `NAME@VERSION`. Raises InputError if none."""
    name, _, version = reference.partition("@")
    if not version:
        if not storage.exists(newest(name)):
            raise InputError(
                f"dataset `{name}` does not exist under {storage.root()}",
                "run jobs/prepare.py with that name first",
            )
        version = storage.read_bytes(newest(name)).decode().strip()
    return dataset(name, version)


def tuning(name: str) -> str:
    """Folder of one search: best.yaml, trials.csv, trials.png, and Ray Tune's own state."""
    return storage.join(storage.root(), "tune", name)


def runs(kind: str) -> str:
    """Folder that holds Ray Train's (`train`) run folders, one for each run name."""
    return storage.join(storage.root(), kind)


def model(name: str, root: str | None = None) -> str:
    """Folder of an exported model, in Hugging Face's layout; `root` is this process's if None."""
    return storage.join(root or storage.root(), "models", name)


def model_content(seal: dict[str, Any]) -> str:
    """Short hash of what a sealed model computes: its files, but for its card and scores."""
    files = {k: v for k, v in seal["files"].items() if k not in ("README.md", "evaluation.json")}
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:12]


def find_model(reference: str) -> str:
    """Folder of an exported model by name, or a URL or path as it is."""
    return reference if "/" in reference else model(reference)


def generation(name: str) -> str:
    """Folder of one batch generation: one Parquet file a shard."""
    return storage.join(storage.root(), "generations", name)
