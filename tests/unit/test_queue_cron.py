"""Jobs that come again: when they are due, and that each time is submitted once."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from queue_state import request

from manta import state as states
from manta.errors import InputError
from manta.jobs import cron, lease, queries, store
from manta.jobs.cron import Clock, Entry
from manta.jobs.model import JobState
from manta.state import State


def at(text: str, zone: str = "UTC") -> float:
    return datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone)).timestamp()


def entry(line: str = "0 3 * * *", checked: str = "2026-11-01T00:00", zone: str = "UTC") -> Entry:
    return Entry(
        name="nightly",
        line=line,
        timezone=zone,
        request=request("nightly"),
        actor="ann@laptop",
        checked_at=at(checked),
        last_id="",
    )


def clock(state: State) -> Clock:
    held = lease.acquire(state)
    assert held is not None
    return Clock(state, held)


def killed(state: State) -> None:
    """The controller is gone and its lease has run out."""
    with state.write() as connection:
        connection.execute(states.leases.update().values(expires_at=0.0))


def ids(state: State) -> list[str]:
    return sorted(job.id for job in queries.listed(state))


def end(state: State, job_id: str) -> None:
    store.ask_stop(state, job_id, "test", "test")
    assert queries.get(state, job_id).state is JobState.STOPPED


def test_the_hour_is_the_one_of_its_time_zone_also_when_summer_time_ends() -> None:
    berlin = entry("30 3 * * *", zone="Europe/Berlin")
    assert berlin.next(at("2026-10-24T12:00")) == at("2026-10-25T03:30", "Europe/Berlin")
    assert berlin.next(at("2026-10-24T12:00")) - berlin.due(at("2026-10-24T12:00")) == 25 * 3600


def test_a_time_that_is_reached_is_due_at_once() -> None:
    assert entry().due(at("2026-11-02T03:00")) == at("2026-11-02T03:00")
    assert entry().due(at("2026-11-02T02:59:58")) == at("2026-11-01T03:00")


def test_times_missed_while_nobody_looked_are_submitted_once(state: State) -> None:
    cron.put(state, entry())
    clock(state).tick(at("2026-11-05T12:00"), changed=True)
    assert ids(state) == ["nightly-20261105T0300Z"]


def test_each_time_is_submitted_once_however_often_it_is_looked_at(state: State) -> None:
    cron.put(state, entry())
    ticking = clock(state)
    for hour in range(2, 6):
        ticking.tick(at(f"2026-11-01T0{hour}:10"), changed=hour % 2 == 0)
    assert ids(state) == ["nightly-20261101T0300Z"]
    end(state, "nightly-20261101T0300Z")
    ticking.tick(at("2026-11-02T03:00"), changed=False)
    assert ids(state) == ["nightly-20261101T0300Z", "nightly-20261102T0300Z"]


def test_who_died_between_submission_and_note_submits_nothing_twice(state: State) -> None:
    cron.put(state, entry())
    clock(state).tick(at("2026-11-01T03:00"), changed=True)
    cron.put(state, entry())  # the row as it was before
    killed(state)
    clock(state).tick(at("2026-11-01T03:05"), changed=True)
    assert ids(state) == ["nightly-20261101T0300Z"]


def test_a_time_whose_predecessor_has_not_ended_is_left_out_and_told(state: State) -> None:
    cron.put(state, entry("0 * * * *"))
    ticking = clock(state)
    ticking.tick(at("2026-11-01T01:00"), changed=True)
    ticking.tick(at("2026-11-01T02:00"), changed=False)
    assert ids(state) == ["nightly-20261101T0100Z"]
    told = [event.text for event in queries.events_of(state) if event.kind == "cron skipped"]
    assert told == [
        "nightly: nightly-20261101T0200Z is left out: nightly-20261101T0100Z has not ended"
    ]
    end(state, "nightly-20261101T0100Z")
    ticking.tick(at("2026-11-01T03:00"), changed=False)
    assert "nightly-20261101T0300Z" in ids(state)


@pytest.mark.parametrize(
    ("line", "zone", "told"),
    [
        ("61 * * * *", "UTC", "cron line `61 \\* \\* \\* \\*`"),
        ("* * * *", "UTC", "five fields"),
        ("* * * * * *", "UTC", "five fields"),
        ("0 0 30 2 *", "UTC", "never due|Bad"),
        ("0 0 * * *", "Mars/Base", "no time zone `Mars/Base`"),
        ("", "UTC", "five fields"),
    ],
)
def test_a_line_that_makes_no_sense_is_refused_in_one_line_and_kept_nowhere(
    state: State, line: str, zone: str, told: str
) -> None:
    with pytest.raises(InputError, match=told) as refused:
        cron.put(state, entry(line, zone=zone))
    assert "\n" not in str(refused.value)
    assert cron.load(state) == []


def test_the_command_refuses_a_bad_line_before_anything_else(tmp_path: Path) -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("manta"), "cron", "add", "n", "0 25 * * *", "--", "true"],
        env={**os.environ, "MANTA_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "cron line `0 25 * * *`" in done.stderr
    assert not (tmp_path / "state.db").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["A B", "* * * * *", "--", "true"], "`A B` cannot be a job's id"),
        (["n", "* * * * *", "--working-dir", "gone", "--", "true"], "gone is not a folder"),
        (["n", "* * * * *", "gone.yaml"], "gone.yaml: cannot be read"),
    ],
)
def test_what_cannot_be_submitted_is_told_in_one_line(
    tmp_path: Path, words: list[str], told: str
) -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("manta"), "cron", "add", *words],
        env={**os.environ, "MANTA_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert told in done.stderr
    assert done.stderr.count("\n") == 1
