"""What the chaos tests share: one cluster, and a place on it where a fault is made."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "integration"))
sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from arena import Arena
from terminal import MANTA, Terminal, end_controller, new_terminal


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Terminal]:
    """A shell whose home has cluster `local` on record, which is up or was killed by a test."""
    shell = new_terminal(tmp_path_factory)
    shell(MANTA, "up", "--ports", "auto")
    yield shell
    shell(MANTA, "down", "--yes")


@pytest.fixture
def arena(cluster: Terminal, tmp_path: Path) -> Iterator[Arena]:
    """The cluster, up, with a queue of the test's own in a file."""
    place = Arena(cluster, tmp_path, database_url=f"sqlite:///{tmp_path}/state.db")
    yield place
    end_controller(place.terminal, signal.SIGKILL)
    place.state.close()
