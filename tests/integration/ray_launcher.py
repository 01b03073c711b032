"""Ray's own cluster launcher, run as its user runs it, on a network where no host answers SSH."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RAY = (str(Path(sys.executable).with_name("ray")),)
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_SSH = """#!/bin/sh
printf '%s\\n' "$*" >> {log}
echo 'ssh: connect to host: Connection refused' >&2
exit 255
"""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """What a command left."""

    exit_code: int
    stdout: str
    stderr: str


@dataclass(frozen=True, kw_only=True)
class Launcher:
    """A user's machine: a home with a cluster token, and an `ssh` that no host answers."""

    folder: Path
    environment: Mapping[str, str]
    command: Sequence[str] = RAY

    def run(self, *arguments: str, timeout_s: float = 400) -> Ended:
        """`ray ARGUMENTS` from the project's folder, its output without colours."""
        done = subprocess.run(
            [*self.command, *arguments],
            cwd=ROOT,
            env=dict(self.environment),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        stdout, stderr = _COLOUR.sub("", done.stdout), _COLOUR.sub("", done.stderr)
        return Ended(exit_code=done.returncode, stdout=stdout, stderr=stderr)

    def write(self, name: str, text: str) -> str:
        path = self.folder / name
        path.write_text(text)
        return str(path)

    def ssh_calls(self) -> list[str]:
        """The command lines of `ssh`, oldest first."""
        log = self.folder / "ssh.log"
        return log.read_text().splitlines() if log.exists() else []

    def resolved(self) -> dict[str, Any]:
        """The cluster config with all that the cloud added; the head's autoscaler works by it."""
        (cache,) = self.folder.glob("ray-config-*")
        config: dict[str, Any] = json.loads(cache.read_text())["config"]
        config.pop("head_node", None)  # as Ray does before it ships the config to the head
        return config


@contextmanager
def launcher(environment: Mapping[str, str], command: Sequence[str] = RAY) -> Iterator[Launcher]:
    """A fresh one; its paths are short enough for Ray's sockets."""
    folder = Path(tempfile.mkdtemp(prefix="m-", dir="/tmp"))
    (folder / "home" / ".ray").mkdir(parents=True)
    (folder / "home" / ".ray" / "auth_token").write_text("0" * 64)
    (folder / "bin").mkdir()
    (folder / "bin" / "ssh").write_text(_SSH.format(log=folder / "ssh.log"))
    (folder / "bin" / "ssh").chmod(0o755)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "MANTA_", "RAY_"))}
    settings = {
        "HOME": str(folder / "home"),
        "TMPDIR": str(folder),
        "PATH": f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "AUTOSCALER_NODE_START_WAIT_S": "1",  # one try of SSH
        "RAY_AUTH_MODE": "token",
        "RAY_USAGE_STATS_ENABLED": "0",
        **environment,
    }
    try:
        yield Launcher(folder=folder, environment=kept | settings, command=command)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
