"""Databases and requests for the tests of the queue."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from manta.jobs.model import JobRequest


def request(job_id: str = "a", **changes: Any) -> JobRequest:
    """A small request."""
    values = {
        "id": job_id,
        "name": "job",
        "entrypoint": "true",
        "runtime_env_passthrough": {},
        "user": "ann",
        "cluster": "local",
        "storage_url": "/nowhere",
    }
    return JobRequest.model_validate(values | changes)


@contextmanager
def postgresql() -> Iterator[str]:
    """The socket folder of a PostgreSQL server of its own; skips, with the reason, without one."""
    folder = _programs()
    with tempfile.TemporaryDirectory(prefix="m-pg-", dir="/tmp") as home:
        if os.getuid() == 0:  # which PostgreSQL refuses to run as
            os.chown(home, 65534, 65534)
        initdb = [folder / "initdb", "-D", f"{home}/data", "-U", "manta", "-A", "trust"]
        subprocess.run([*_not_root(), *initdb], check=True, capture_output=True, cwd=home)
        start_postgresql(home)
        try:
            yield home
        finally:
            stop_postgresql(home)


def start_postgresql(home: str) -> None:
    """Start the server whose socket folder is `home`; returns when it answers."""
    options = f"-c listen_addresses= -k {home}"
    _control(home, "start", "-w", "-l", f"{home}/log", "-o", options).check_returncode()


def stop_postgresql(home: str) -> None:
    """End the server at once, as a crash does: its connections break, and nothing is put away."""
    _control(home, "stop", "-m", "immediate")


def _control(home: str, *words: str) -> subprocess.CompletedProcess[bytes]:
    command = [*_not_root(), _programs() / "pg_ctl", "-D", f"{home}/data", *words]
    return subprocess.run(command, capture_output=True, cwd=home)


def _programs() -> Path:
    """Where the server's programs are."""
    folders = [Path(p) for p in Path("/usr/lib/postgresql").glob("*/bin") if Path(p).is_dir()]
    if not folders and not (found := shutil.which("initdb")):
        pytest.skip("no PostgreSQL server on this machine")
    return folders[-1] if folders else Path(str(found)).parent


def _not_root() -> list[str]:
    return ["runuser", "-u", "nobody", "--"] if os.getuid() == 0 else []
