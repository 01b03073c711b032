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
    programs = [Path(p) for p in Path("/usr/lib/postgresql").glob("*/bin") if Path(p).is_dir()]
    if not programs and not (found := shutil.which("initdb")):
        pytest.skip("no PostgreSQL server on this machine")
    folder = programs[-1] if programs else Path(str(found)).parent
    with tempfile.TemporaryDirectory(prefix="m-pg-", dir="/tmp") as home:
        run = []
        if os.getuid() == 0:  # which PostgreSQL refuses to run as
            os.chown(home, 65534, 65534)
            run = ["runuser", "-u", "nobody", "--"]
        data, log = f"{home}/data", f"{home}/log"
        start = ["start", "-w", "-l", log, "-o", f"-c listen_addresses= -k {home}"]
        initdb = [*run, folder / "initdb", "-D", data, "-U", "manta", "-A", "trust"]
        control = [*run, folder / "pg_ctl", "-D", data]
        subprocess.run(initdb, check=True, capture_output=True, cwd=home)
        subprocess.run([*control, *start], check=True, capture_output=True, cwd=home)
        try:
            yield home
        finally:
            stop = [*control, "stop", "-m", "immediate"]
            subprocess.run(stop, check=False, capture_output=True, cwd=home)
