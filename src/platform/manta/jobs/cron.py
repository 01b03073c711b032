"""Jobs and pipelines that come again: accepted once, submitted at each time of a cron line.

Whoever is due while no controller runs is submitted once when one does, not once for each time
that was missed. A time whose predecessor has not ended is left out and told.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import sqlalchemy as sa
from cronsim import CronSim, CronSimError
from pydantic import TypeAdapter

from manta.errors import InputError
from manta.jobs import queries, reports, runs, store
from manta.jobs.lease import Lease
from manta.jobs.model import JobRequest, check_id
from manta.jobs.run_request import RunRequest, with_id
from manta.state import State, events, now
from manta.state import cron as table

STAMP = "%Y%m%dT%H%MZ"
"""Of the time that is due, in UTC, at the end of each job's id."""
_Work: TypeAdapter[JobRequest | RunRequest] = TypeAdapter(JobRequest | RunRequest)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A job or a pipeline that comes again."""

    name: str
    line: str
    """Five fields: minute, hour, day of month, month, day of week."""
    timezone: str
    request: JobRequest | RunRequest
    """What is submitted, with `name` in place of the id."""
    actor: str
    checked_at: float
    """UTC seconds; times until then are dealt with."""
    last_id: str
    """Id of the newest job or run; empty before the first."""

    def due(self, at: float) -> float:
        """The newest time that is due at `at`, both in UTC seconds."""
        return next(CronSim(self.line, self._here(at + 1.0), reverse=True)).timestamp()

    def next(self, at: float) -> float:
        """The first time after `at`."""
        return next(CronSim(self.line, self._here(at))).timestamp()

    def job_id(self, due: float) -> str:
        """Id of the job of one time: the same for whoever submits it."""
        return f"{self.name}-{datetime.fromtimestamp(due, UTC):{STAMP}}"

    def _here(self, at: float) -> datetime:
        return datetime.fromtimestamp(at, ZoneInfo(self.timezone))


def check_name(name: str) -> None:
    """Raise InputError for a name from which no job's id can be made."""
    check_id(name)
    check_id(f"{name}-{datetime.fromtimestamp(0, UTC):{STAMP}}")


def check_line(line: str, timezone: str) -> None:
    """Raise InputError for a cron line or time zone that makes no sense, or is never due."""
    try:
        zone = ZoneInfo(timezone)
    except (KeyError, OSError, ValueError):
        raise InputError(f"no time zone `{timezone}`", "write e.g. UTC or Europe/Berlin") from None
    try:
        if len(line.split()) != 5:
            raise CronSimError("it has not five fields")
        next(CronSim(line, datetime.now(zone)))
        next(CronSim(line, datetime.now(zone), reverse=True))
    except CronSimError as error:
        raise InputError(
            f"cron line `{line}`: {str(error) or 'not understood'}",
            "minute, hour, day of month, month, day of week: `30 3 * * 1-5` is 3:30 on weekdays",
        ) from None
    except StopIteration:
        raise InputError(f"cron line `{line}` is never due") from None


def put(state: State, entry: Entry) -> None:
    """Keep it, in place of one of that name. Raises InputError for what it cannot be."""
    check_name(entry.name)
    check_line(entry.line, entry.timezone)
    if isinstance(entry.request, RunRequest):
        with_id(entry.request, entry.job_id(0))  # raises where a step's name makes it too long
    with state.write() as connection:
        connection.execute(table.delete().where(table.c.name == entry.name))
        connection.execute(
            table.insert().values(
                name=entry.name,
                line=entry.line,
                timezone=entry.timezone,
                request=entry.request.model_dump_json(),
                actor=entry.actor,
                checked_at=entry.checked_at,
                last_id=entry.last_id,
            )
        )
        _note(connection, entry.actor, "cron set", entry, f"{entry.line} {entry.timezone}")


def remove(state: State, name: str, actor: str) -> None:
    """It does not come again; what was submitted goes on. Raises InputError if there is none."""
    found = {entry.name: entry for entry in load(state)}
    if name not in found:
        known = ", ".join(found) or "there is none"
        raise InputError(f"no cron entry `{name}`", f"known: {known}")
    with state.write() as connection:
        connection.execute(table.delete().where(table.c.name == name))
        _note(connection, actor, "cron removed", found[name], found[name].line)


def load(state: State) -> list[Entry]:
    """All entries, by name."""
    with state.read() as connection:
        rows = connection.execute(sa.select(table).order_by(table.c.name)).all()
    return [Entry(**row._asdict() | {"request": _Work.validate_json(row.request)}) for row in rows]


class Clock:
    """Submits what is due; kept by the controller."""

    def __init__(self, state: State, lease: Lease) -> None:
        self._state, self._lease = state, lease
        self._next = 0.0
        self.entries: list[Entry] = []

    def tick(self, at: float, *, changed: bool) -> None:
        """Look, if something has changed or a time has come; `at` is now, in UTC seconds."""
        if not changed and at < self._next:
            return
        self.entries = [self._submit_if_due(entry, at) for entry in load(self._state)]
        self._next = min((entry.next(at) for entry in self.entries), default=float("inf"))

    def _submit_if_due(self, entry: Entry, at: float) -> Entry:
        due = entry.due(at)
        if due <= entry.checked_at:
            return entry
        job_id = entry.job_id(due)
        if self._is_running(entry.last_id) and entry.last_id != job_id:
            return self._checked(entry, due, entry.last_id, f"{entry.last_id} has not ended")
        try:
            self._submit(entry, job_id)
        except InputError as error:  # its id is another's: that must not hold up all others
            return self._checked(entry, due, entry.last_id, error.what)
        return self._checked(entry, due, job_id, "")

    def _submit(self, entry: Entry, job_id: str) -> None:
        who = f"cron for {entry.actor}"
        if isinstance(entry.request, RunRequest):
            runs.submit(self._state, with_id(entry.request, job_id), who)
        else:
            store.submit(self._state, reports.under(entry.request, job_id), who)

    def _is_running(self, last_id: str) -> bool:
        if not last_id:
            return False
        if (job := queries.find(self._state, last_id)) is not None:
            return not job.state.done
        run = runs.find(self._state, last_id)
        return run is not None and not run.done

    def _checked(self, entry: Entry, due: float, last_id: str, skipped: str) -> Entry:
        with self._state.write() as connection:
            self._lease.check(connection)
            told = {"checked_at": due, "last_id": last_id}
            connection.execute(table.update().where(table.c.name == entry.name).values(**told))
            if skipped:
                text = f"{entry.job_id(due)} is left out: {skipped}"
                _note(connection, "controller", "cron skipped", entry, text)
        return Entry(**vars(entry) | told)


def _note(connection: sa.Connection, actor: str, kind: str, entry: Entry, text: str) -> None:
    where = {"job_id": "", "cluster": entry.request.cluster}
    note = {"at": now(), "actor": actor, "kind": kind, "text": f"{entry.name}: {text}"}
    connection.execute(events.insert().values(**note, **where))
