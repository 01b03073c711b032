"""A user's shell, for tests that drive Manta as a user does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

MANTA = str(Path(sys.executable).with_name("manta"))
RAY = str(Path(sys.executable).with_name("ray"))


@dataclass(frozen=True)
class Terminal:
    """A user's shell: a project folder, an environment, and the commands they type."""

    folder: Path
    environment: dict[str, str]

    def __call__(self, *words: str, ok: int | None = 0) -> subprocess.CompletedProcess[str]:
        """Run a command to its end and require exit code `ok` (None: any)."""
        result = subprocess.run(
            words,
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert ok is None or result.returncode == ok, result.stdout + result.stderr
        return result

    def start(self, *words: str) -> subprocess.Popen[str]:
        """Run a command in the background, output captured."""
        return subprocess.Popen(
            words,
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def json(self, *words: str) -> Any:
        """What `manta WORDS --json` prints."""
        return json.loads(self(MANTA, *words, "--json").stdout)

    @property
    def home(self) -> Path:
        """Manta's home."""
        return Path(self.environment["MANTA_HOME"])


def new_terminal(factory: pytest.TempPathFactory) -> Terminal:
    """A shell with a project, a home and a storage of its own."""
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MANTA_"))},
        "MANTA_HOME": str(factory.mktemp("home")),
        "MANTA_STORAGE": str(factory.mktemp("storage")),
    }
    return Terminal(factory.mktemp("project"), environment)


def controller(terminal: Terminal) -> psutil.Process | None:
    """The controller that works on this terminal's state, if one does."""
    holder = json.loads(terminal(MANTA, "queue", "--status", "--json", ok=None).stdout)[
        "controller"
    ]
    return psutil.Process(int(holder.split(" ")[1])) if holder else None


def end_controller(terminal: Terminal, number: int = signal.SIGTERM) -> None:
    """Signal the controller and wait until it has ended."""
    process = controller(terminal)
    if process is not None:
        process.send_signal(number)
        process.wait(timeout=90)


def until(check: Callable[[], Any], what: str, timeout_s: float = 180) -> Any:
    """Poll `check` until it gives something true; returns that."""
    deadline = time.monotonic() + timeout_s
    while not (found := check()):
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.2)
    return found
