"""Rules over what a job ships: Ray's limit on the size of a working directory."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from manta.check.rules import Fault, File, Project, rule
from manta.spec import JobSpec, PipelineSpec, Work
from manta.spec.loading import Path_

MAX_PACKAGE_BYTES = 512 * 2**20
"""Ray refuses more: GCS_STORAGE_MAX_SIZE in ray/_private/runtime_env/packaging.py."""
MAX_ENTRIES = 50_000
"""Files that are looked at; a directory of more is left to Ray."""
_NEVER_SHIPPED = frozenset({".git", ".venv", "venv", "__pycache__"})  # Ray's default excludes


@rule("working-dir-too-large", "error", ("job", "pipeline"))
def working_dir_too_large(file: File, project: Project) -> Iterator[Fault]:
    """Ray uploads the working directory with the job and refuses it over 512 MiB."""
    for path, work in works(file):
        env = work.runtime_env_passthrough
        given = env.get("working_dir", ".")
        if not isinstance(given, str) or "://" in given or given.endswith((".zip", ".jar")):
            continue
        folder = project.root / os.path.expanduser(given)  # noqa: PTH111  (never raises)
        if _package_bytes(folder, _excludes(env)) > MAX_PACKAGE_BYTES:
            where = folder.resolve() if given == "." else given
            what = f"{where} has over {MAX_PACKAGE_BYTES // 2**20} MiB, Ray's limit of a package"
            fix = "list what is not needed in runtime_env.excludes or .gitignore"
            yield Fault((*path, "runtime_env", "working_dir"), what, fix)


def works(file: File) -> Iterator[tuple[Path_, Work]]:
    """The job, or each step of the pipeline, with its path."""
    if isinstance(file.spec, JobSpec):
        yield (), file.spec
    elif isinstance(file.spec, PipelineSpec):
        for i, step in enumerate(file.spec.steps):
            if step.entrypoint:
                yield ("steps", i), step


def _excludes(env: dict[str, Any]) -> tuple[str, ...]:
    excludes = env.get("excludes")
    return tuple(map(str, excludes)) if isinstance(excludes, list) else ()


@functools.lru_cache(maxsize=64)  # steps of a pipeline ship the same folder
def _package_bytes(folder: Path, excludes: tuple[str, ...]) -> int:
    """Bytes that would be shipped; stops counting once it is too much, or after many files."""
    patterns = [*excludes, *_ignored(folder)]
    total = entries = 0
    for current, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not _is_left_out(name, patterns)]
        for name in names:
            entries += 1
            if not _is_left_out(name, patterns):
                total += _size(Path(current, name))
            if total > MAX_PACKAGE_BYTES or entries > MAX_ENTRIES:
                return total
    return total


def _ignored(folder: Path) -> list[str]:
    lines: list[str] = []
    for name in (".gitignore", ".rayignore"):
        try:
            lines += (folder / name).read_text(errors="replace").splitlines()
        except OSError:
            continue
    return [line.strip() for line in lines if line.strip() and not line.startswith(("#", "!"))]


def _is_left_out(name: str, patterns: list[str]) -> bool:
    """Whether an entry's own name is excluded; patterns with a path are taken by their last part.

    Broader than Ray's matching, so that what is reported is really too large.
    """
    last_parts = (pattern.strip("/").rsplit("/", 1)[-1] for pattern in patterns)
    return name in _NEVER_SHIPPED or any(fnmatch(name, part) for part in last_parts)


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except OSError:
        return 0
