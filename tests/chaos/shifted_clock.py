"""A clock of its own for the processes of one terminal, which a test can step while they run."""

from __future__ import annotations

import shutil
import struct
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from terminal import Terminal

SOURCE = Path(__file__).with_name("shifted_clock.c")


@dataclass(frozen=True)
class ShiftedClock:
    """A shell whose processes see another time of day than everybody else."""

    terminal: Terminal
    file: Path

    def step_to(self, ahead_s: int) -> None:
        """From now on the clock is that much ahead of the machine's; negative: behind."""
        with self.file.open("r+b", buffering=0) as file:
            file.write(struct.pack("l", ahead_s))


def shifted(terminal: Terminal, folder: Path, ahead_s: int = 0) -> ShiftedClock:
    """Give the processes of `terminal` a clock of their own; skips where it cannot be compiled."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler, which another clock for single processes needs")
    folder.mkdir()
    library, file = folder / "shifted_clock.so", folder / "ahead"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, SOURCE], check=True)
    file.write_bytes(struct.pack("l", ahead_s))
    own = {"LD_PRELOAD": str(library), "SHIFTED_CLOCK": str(file)}
    shell = replace(terminal, environment=terminal.environment | own)
    told = shell(
        "python3", "-c", "import time; print(time.time() - time.clock_gettime(11))"
    ).stdout
    plain = terminal("python3", "-c", "import time; print(time.time() - time.clock_gettime(11))")
    assert abs(float(told) - float(plain.stdout) - ahead_s) < 60, "the shift is seen"
    return ShiftedClock(shell, file)
