"""Who follows a job waits while the database is away, and not for ever."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import sqlalchemy as sa
from queue_state import request

from manta import state as states
from manta.errors import MantaError
from manta.jobs import follow, store
from manta.jobs.model import JobState
from manta.state import State, StateError


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[State]:
    monkeypatch.setattr(follow, "AGAIN_S", 0.01)
    opened = states.open_state(f"sqlite:///{tmp_path}/state.db")
    store.submit(opened, request("a", storage_url=str(tmp_path)), "ann")
    store.ask_stop(opened, "a", "ann", "enough")
    yield opened
    opened.close()


@contextmanager
def away(state: State, num_times: int) -> Iterator[None]:
    """The next so many transactions find no database."""
    left = [num_times]

    def fail(connection: sa.Connection) -> None:
        if left[0]:
            left[0] -= 1
            raise sa.exc.OperationalError("", {}, Exception("gone"))

    sa.event.listen(state.engine, "begin", fail)
    yield
    sa.event.remove(state.engine, "begin", fail)


def followed(state: State) -> JobState:
    return follow.follow(state, "a", print, print, lambda: None).state


def test_a_database_that_comes_back_is_waited_for(
    file: State, caplog: pytest.LogCaptureFixture
) -> None:
    with away(file, 5):
        assert followed(file) is JobState.STOPPED
    assert caplog.text.count("gone") == 1, "it is told once"


def test_one_that_stays_away_is_given_up(file: State, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "PATIENCE_S", 0.1)
    with away(file, 10**6), pytest.raises(StateError, match="gone"):
        followed(file)


def test_a_job_that_does_not_exist_is_no_reason_to_wait(file: State) -> None:
    with pytest.raises(MantaError, match="no job none"):
        follow.follow(file, "none", print, print, lambda: None)
