"""The code that a job ships, kept in storage: it outlives the user's edits and the cluster.

Packages are Ray's own: made, named and left out of (`.gitignore`, `.rayignore`, `excludes`) by
Ray's code, so that a job gets exactly the files that `ray job submit --working-dir` would ship.
Only where they lie differs: in storage, from where the controller gives them to whatever cluster
runs an attempt.
"""

from __future__ import annotations

import logging
import os
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manta import storage
from manta.errors import InputError

_GCS = "gcs://"


@dataclass(frozen=True, kw_only=True)
class Shipped:
    """A runtime_env without local paths, and the packages that it names."""

    runtime_env_passthrough: Mapping[str, Any]
    packages: tuple[str, ...]


def ship(runtime_env: Mapping[str, Any], storage_url: str) -> Shipped:
    """Put the local folders of a runtime_env into storage, each content once.

    Raises:
        InputError: Ray cannot use the runtime_env, or a folder in it is not there.
        MantaError: the storage cannot be written.
    """
    from ray._private.runtime_env.py_modules import upload_py_modules_if_needed
    from ray._private.runtime_env.working_dir import upload_working_dir_if_needed
    from ray.runtime_env import RuntimeEnv

    result, packages = dict(runtime_env), list[str]()
    ignore = os.environ.get("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "0") != "1"
    put = _putter(storage_url, packages, respect_gitignore=ignore)
    try:
        upload_working_dir_if_needed(result, ignore, logger=_quiet(), upload_fn=put(parent=False))
        upload_py_modules_if_needed(result, ignore, logger=_quiet(), upload_fn=put(parent=True))
        result.pop("excludes", None)
        checked = RuntimeEnv(**result).to_dict()  # reads requirement files, checks types
    except (TypeError, ValueError) as error:
        raise InputError(f"runtime_env: {error}") from None
    return Shipped(runtime_env_passthrough=checked, packages=tuple(packages))


def _putter(
    storage_url: str, packages: list[str], *, respect_gitignore: bool
) -> Callable[..., Callable[..., None]]:
    """What Ray calls with each local path: the counterpart of its own upload to a cluster."""
    from ray._private.runtime_env import packaging

    packaging.default_logger.setLevel(logging.WARNING)  # it names every ignored file, each time

    def for_kind(*, parent: bool) -> Callable[..., None]:
        def put(path: str, excludes: list[str] | None, is_file: bool = False) -> None:
            if is_file:
                name = packaging.get_uri_for_package(Path(path)).removeprefix(_GCS)
                packages.append(name)
                _keep(name, Path(path), storage_url)
                return
            uri = packaging.get_uri_for_directory(path, respect_gitignore, excludes=excludes)
            name = uri.removeprefix(_GCS)
            packages.append(name)
            if storage.exists(_place(name, storage_url)):
                return
            with tempfile.TemporaryDirectory(prefix="manta-") as folder:
                target = Path(folder, name)
                packaging.create_package(
                    path,
                    target,
                    include_gitignore=respect_gitignore,
                    include_parent_dir=parent,
                    excludes=excludes,
                    logger=_quiet(),
                )
                _keep(name, target, storage_url)

        return put

    return for_kind


def load(name: str, storage_url: str) -> bytes:
    """The bytes of a package."""
    return storage.read_bytes(_place(name, storage_url))


def code_version(folder: Path) -> str:
    """The folder's git commit, with `+` if files differ from it; empty if it has none."""
    head = _git(folder, "rev-parse", "HEAD")
    if not head:
        return ""
    return head + ("+" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")


def _keep(name: str, file: Path, storage_url: str) -> None:
    if not storage.exists(_place(name, storage_url)):
        storage.write_bytes(_place(name, storage_url), file.read_bytes())


def _place(name: str, storage_url: str) -> str:
    return storage.join(storage_url, "code", name)


def _quiet() -> logging.Logger:
    logger = logging.getLogger("manta.packages")
    logger.setLevel(logging.ERROR)
    return logger


def _git(folder: Path, *words: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words],
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
