"""Databases that exist for one measurement."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def sqlite() -> Iterator[str]:
    """The URL of a file in a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="m-bench-") as folder:
        yield f"sqlite:///{folder}/state.db"


@contextmanager
def postgresql() -> Iterator[str]:
    """The URL of a server with the settings that it is installed with, on a socket."""
    initdb = shutil.which("initdb") or max(map(str, _installed()), default="")
    if not initdb:
        raise SystemExit("no PostgreSQL server on this machine: leave --postgresql out")
    with tempfile.TemporaryDirectory(prefix="m-bench-", dir="/tmp") as home:
        run = []
        if os.getuid() == 0:  # which PostgreSQL refuses to run as
            os.chown(home, 65534, 65534)
            run = ["runuser", "-u", "nobody", "--"]
        control = [*run, str(Path(initdb).with_name("pg_ctl")), "-D", f"{home}/data"]
        options = f"-c listen_addresses= -k {home}"
        _run([*run, initdb, "-D", f"{home}/data", "-U", "manta", "-A", "trust"], home)
        _run([*control, "start", "-w", "-l", f"{home}/log", "-o", options], home)
        try:
            yield f"postgresql+psycopg://manta@/postgres?host={home}"
        finally:
            _run([*control, "stop", "-m", "immediate"], home)


def _installed() -> Iterator[Path]:
    """Debian keeps them off the path."""
    return Path("/usr/lib/postgresql").glob("*/bin/initdb")


def _run(words: list[str], folder: str) -> None:
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, cwd=folder)
