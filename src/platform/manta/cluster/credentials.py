"""One random token per cluster, in a file that only its owner can read. It is never printed."""

from __future__ import annotations

import os
import secrets
import uuid
from pathlib import Path

from manta.cluster import record
from manta.errors import InputError

OWNER_ONLY = 0o600
NUM_BYTES = 32


def token_path(name: str) -> Path:
    """File of the token of cluster `name`."""
    return record.home() / "clusters" / name / "auth_token"


def ensure_token(name: str) -> Path:
    """The token's file; made if it is not there, so that a restart keeps clients working."""
    path = token_path(name)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        _create(path, secrets.token_hex(NUM_BYTES))
    path.chmod(OWNER_ONLY)
    return path


def read_token(path: Path) -> str:
    """The token. Raises InputError if the file is missing, unreadable or empty."""
    try:
        token = path.read_text().strip()
    except OSError as error:
        raise InputError(f"{path}: cannot read the cluster's token ({error.strerror})") from None
    if not token:
        raise InputError(f"{path}: the cluster's token is empty", "delete the file")
    return token


def headers(token_path: str) -> dict[str, str]:
    """HTTP headers that show the token; none for a cluster that asks for none."""
    return {"Authorization": f"Bearer {read_token(Path(token_path))}"} if token_path else {}


def _create(path: Path, token: str) -> None:
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, OWNER_ONLY)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(token)
        os.link(partial, path)  # unlike a rename, never replaces a token made meanwhile
    except FileExistsError:
        pass
    finally:
        partial.unlink()
