"""Where each artifact lies under the storage root."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

from manta import storage
from manta.errors import InputError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


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
    """Folder of an exported model, in Hugging Face's layout; `root` is this process's if None.

    Args:
        name: NAME, which each training replaces, or the registry's NAME@VERSION or NAME@ALIAS.

    Raises:
        InputError: there is no such alias.
    """
    root = root or storage.root()
    name, _, version = name_of_version(name, root).partition("@")
    if version:
        return storage.join(registry(root), name, version)
    return storage.join(root, "models", name)


def registry(root: str) -> str:
    """Folder of the models that were registered: NAME/VERSION/, and NAME/aliases/."""
    return storage.join(root, "registry")


def alias(root: str, name: str, alias: str) -> str:
    """File that says which version of model `name` an alias means."""
    return storage.join(registry(root), name, "aliases", f"{alias}.json")


def name_of_version(name: str, root: str) -> str:
    """NAME@VERSION for NAME@ALIAS; others as they are. Raises InputError for an unknown alias."""
    base, at, wanted = name.partition("@")
    if not at or wanted.isdigit():
        return name
    file = alias(root, base, wanted)
    if not _NAME.fullmatch(base) or not _NAME.fullmatch(wanted) or not storage.exists(file):
        raise InputError(
            f"model `{name}`: there is no `{wanted}` of `{base}`",
            f"`manta models list {base}` shows what there is",
        )
    return f"{base}@{storage.read_json(file)['version']}"


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
