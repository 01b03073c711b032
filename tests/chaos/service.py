"""Controllers as a service runs them: what ends is started again."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from terminal import MANTA, Terminal


@dataclass
class Service:
    """One `manta queue` that is kept up."""

    terminal: Terminal
    log: Path
    num_starts: int = 0
    process: subprocess.Popen[bytes] | None = None
    _ending: threading.Event = field(default_factory=threading.Event)

    def keep_up(self) -> None:
        """Start it, and again each time it ends, until `end`."""
        while not self._ending.is_set():
            with self.log.open("ab") as log:
                self.process = subprocess.Popen(
                    [MANTA, "queue"], env=self.terminal.environment, stdout=log, stderr=log
                )
            self.num_starts += 1
            self.process.wait()
            self._ending.wait(1.0)

    def end(self) -> None:
        """For good."""
        self._ending.set()
        if self.process is not None:
            self.process.kill()


@contextmanager
def services(*terminals: Terminal, folder: Path) -> Iterator[list[Service]]:
    """A service for each terminal."""
    running = [Service(shell, folder / f"queue-{i}.log") for i, shell in enumerate(terminals)]
    threads = [threading.Thread(target=service.keep_up) for service in running]
    for thread in threads:
        thread.start()
    try:
        yield running
    finally:
        for service in running:
            service.end()
        for thread in threads:
            thread.join(timeout=30)
