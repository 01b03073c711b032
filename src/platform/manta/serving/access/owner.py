"""The key of a cluster's owner: made with the first application that asks for one."""

from __future__ import annotations

import getpass
import os
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from manta.cluster import record
from manta.cluster.record import ClusterRecord
from manta.errors import InputError
from manta.serving.access import key_store, keys

BUILDER = "manta.serving.llm:build_openai_app"
FILE = "api_key"
"""Beside the cluster's token; jobs on this machine find it there."""


def is_guarded(app: Mapping[str, Any]) -> bool:
    """Whether an entry of a Serve config is an application that asks for keys."""
    arguments = app.get("args") or {}
    if app.get("import_path") != BUILDER and "guard" not in arguments:
        return False
    guard = arguments.get("guard") or {}
    return not isinstance(guard, dict) or guard.get("keys") != "none"


def key_file(cluster: str | None = None) -> Path | None:
    """Where the owner's key lies on this machine; None if it does not.

    Args:
        cluster: whose; None: of the one that this process belongs to.
    """
    token = os.environ.get("RAY_AUTH_TOKEN_PATH")
    near = str(record.path(cluster)) if cluster else token
    beside = Path(near).with_name(FILE) if near else None
    return beside if beside and beside.exists() else None


def read_secret(path: Path) -> str:
    """The secret in a file. Raises InputError if it cannot be read."""
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        raise InputError(
            f"{path}: cannot be read ({reason})", "write a key there: `manta keys make`"
        ) from None


def ensure_key(cluster: ClusterRecord) -> Path:
    """The file (mode 0600) that holds the owner's key; made if there is none that is good.

    Raises:
        MantaError: the storage or the file cannot be written.
    """
    path = record.path(cluster.name).with_name(FILE)
    if _is_good(path, cluster.storage_url):
        return path
    key, secret = keys.make(
        name=f"owner-of-{cluster.name}",
        owner=getpass.getuser(),
        role=keys.Role.ADMIN,
        now=time.time(),
    )
    key_store.save(cluster.storage_url, key)
    write_secret(path, secret)
    return path


def write_secret(path: Path, secret: str) -> None:
    """Write a file that only its owner can read, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secret + "\n")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _is_good(path: Path, root: str) -> bool:
    if not path.exists():
        return False
    sha256 = keys.digest(path.read_text().strip().encode())
    now = time.time()
    return any(
        stored.key.sha256 == sha256 and stored.alive(now)
        for stored in key_store.read(root).values()
    )
