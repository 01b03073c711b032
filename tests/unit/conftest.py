"""What the queue's unit tests share: a state on each kind of database, a controller at work."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from queue_site import Site
from queue_state import postgresql

from manta import state as states
from manta.jobs import lease as leases
from manta.jobs.lease import Lease
from manta.state import State


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """The socket folder of a PostgreSQL server; skips, with the reason, where there is none."""
    with postgresql() as folder:
        yield folder


@pytest.fixture(params=["sqlite", "postgresql"])
def state(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[State]:
    """An empty state, once in a file and once on a server."""
    if request.param == "sqlite":
        opened = states.open_state(f"sqlite:///{tmp_path}/state.db")
        yield opened
    else:
        if find_spec("psycopg") is None:
            pytest.skip("no PostgreSQL driver: psycopg is not installed")
        folder = request.getfixturevalue("server")
        opened = states.open_state(f"postgresql+psycopg://manta@/postgres?host={folder}")
        yield opened
        states.metadata.drop_all(opened.engine)
    opened.close()


@pytest.fixture
def lease(state: State) -> Lease:
    """The right to act on it."""
    taken = leases.acquire(state)
    assert taken is not None
    return taken


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A state and a cluster; a controller when it is told to start."""
    monkeypatch.setenv("MANTA_HOME", str(tmp_path / "home"))
    made = Site(tmp_path)
    yield made
    made.stop()
    made.ray.close()
    made.state.close()
