"""Databases and requests for the tests of the queue."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
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
    """The URL of an empty database on a server of its own; skips, with the reason, without one."""
    if find_spec("psycopg") is None:
        pytest.skip("no PostgreSQL driver: psycopg is not installed")
    programs = [Path(p) for p in Path("/usr/lib/postgresql").glob("*/bin") if Path(p).is_dir()]
    if not programs and not (found := shutil.which("initdb")):
        pytest.skip("no PostgreSQL server on this machine")
    folder = programs[-1] if programs else Path(str(found)).parent
    with tempfile.TemporaryDirectory(prefix="m-pg-", dir="/tmp") as home:
        user = ["-u", "nobody"] if os.getuid() == 0 else []
        if user:
            os.chown(home, 65534, 65534)
        run = ["runuser", *user, "--"] if user else []
        data, log = f"{home}/data", f"{home}/log"
        start = ["start", "-w", "-l", log, "-o", f"-c listen_addresses= -k {home}"]
        subprocess.run(
            [*run, folder / "initdb", "-D", data, "-U", "manta", "-A", "trust"],
            check=True,
            capture_output=True,
            cwd=home,
        )
        subprocess.run(
            [*run, folder / "pg_ctl", "-D", data, *start],
            check=True,
            capture_output=True,
            cwd=home,
        )
        try:
            yield f"postgresql+psycopg://manta@/postgres?host={home}"
        finally:
            stop = [*run, folder / "pg_ctl", "-D", data, "stop", "-m", "immediate"]
            subprocess.run(stop, check=False, capture_output=True, cwd=home)
