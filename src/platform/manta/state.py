"""SQL state that outlives every process and cluster: SQLite by default, PostgreSQL by URL.

Writers take turns: `write` holds the database's one write lock (SQLite's own; an advisory lock
on PostgreSQL) from its first statement to its commit. So what is committed has one order, and
numbers drawn from a sequence grow in that order: who has seen event 7 has seen all before it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError

from manta.errors import InputError, MantaError

URL_VARIABLE = "MANTA_STATE"
SCHEMA_VERSION = 1
BUSY_TIMEOUT_S = 30
_ADVISORY_LOCK = 0x6D616E7461  # "manta"

metadata = sa.MetaData()
# SQLite numbers rows only where the key is a plain INTEGER.
_Number = sa.BigInteger().with_variant(sa.Integer, "sqlite")

meta = sa.Table(
    "manta_meta",
    metadata,
    sa.Column("key", sa.Text, primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
)

jobs = sa.Table(
    "jobs",
    metadata,
    sa.Column("seq", _Number, primary_key=True, autoincrement=True),
    sa.Column("id", sa.Text, nullable=False, unique=True),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("origin", sa.Text, nullable=False),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("user", sa.Text, nullable=False),
    sa.Column("team", sa.Text, nullable=False),
    sa.Column("priority", sa.Integer, nullable=False),
    sa.Column("cluster", sa.Text, nullable=False),
    sa.Column("clusters", sa.Text, nullable=False),
    sa.Column("spill_after_s", sa.Float, nullable=False),
    sa.Column("queued_at", sa.Float, nullable=False),
    sa.Column("shape", sa.Text, nullable=False),
    sa.Column("digest", sa.Text, nullable=False),
    sa.Column("entrypoint", sa.Text, nullable=False),
    sa.Column("storage_url", sa.Text, nullable=False),
    sa.Column("request", sa.Text, nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("num_failures", sa.Integer, nullable=False),
    sa.Column("submitted_at", sa.Float, nullable=False),
    sa.Column("not_before", sa.Float, nullable=False),
    sa.Column("deadline_at", sa.Float),
    sa.Column("started_at", sa.Float),
    sa.Column("ended_at", sa.Float),
    sa.Column("cause", sa.Text, nullable=False),
    sa.Column("message", sa.Text, nullable=False),
    sa.Column("stop_reason", sa.Text, nullable=False),
    sa.Index("jobs_by_state", "state", "seq"),
    sa.Index("jobs_by_user", "user", "seq"),
    sqlite_autoincrement=True,
)

attempts = sa.Table(
    "attempts",
    metadata,
    sa.Column("job_id", sa.Text, sa.ForeignKey("jobs.id"), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("submission_id", sa.Text, nullable=False, unique=True),
    sa.Column("cluster", sa.Text, nullable=False),
    sa.Column("cluster_id", sa.Text, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("resources", sa.Text, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("started_at", sa.Float),
    sa.Column("ended_at", sa.Float),
    sa.Column("node_id", sa.Text, nullable=False),
    sa.Column("exit_code", sa.Integer),
    sa.Column("cause", sa.Text, nullable=False),
    sa.Column("message", sa.Text, nullable=False),
    sa.Column("log_state", sa.Text, nullable=False),
)

events = sa.Table(
    "events",
    metadata,
    sa.Column("seq", _Number, primary_key=True, autoincrement=True),
    sa.Column("at", sa.Float, nullable=False),
    sa.Column("actor", sa.Text, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("job_id", sa.Text, nullable=False),
    sa.Column("cluster", sa.Text, nullable=False),
    sa.Column("text", sa.Text, nullable=False),
    sa.Index("events_by_job", "job_id", "seq"),
    sqlite_autoincrement=True,
)

# Nobody rewrites what happened, by mistake or by a fault of ours.
_SEALED = "events are append-only"
_SEALS = {
    "sqlite": [
        f"CREATE TRIGGER events_no_{what.lower()} BEFORE {what} ON events "
        f"BEGIN SELECT RAISE(ABORT, '{_SEALED}'); END"
        for what in ("UPDATE", "DELETE")
    ],
    "postgresql": [
        "CREATE OR REPLACE FUNCTION events_sealed() RETURNS trigger LANGUAGE plpgsql AS "
        f"$$ BEGIN RAISE EXCEPTION '{_SEALED}'; END $$",
        "CREATE TRIGGER events_no_change BEFORE UPDATE OR DELETE ON events "
        "FOR EACH ROW EXECUTE FUNCTION events_sealed()",
    ],
}


@sa.event.listens_for(events, "after_create")
def _seal(_: sa.Table, connection: sa.Connection, **__: object) -> None:
    for statement in _SEALS.get(connection.dialect.name, ()):
        connection.exec_driver_sql(statement)


leases = sa.Table(
    "leases",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("holder", sa.Text, nullable=False),
    sa.Column("token", sa.Integer, nullable=False),
    sa.Column("expires_at", sa.Float, nullable=False),
)

clusters = sa.Table(
    "clusters",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("cluster_id", sa.Text, nullable=False),
    sa.Column("storage_url", sa.Text, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("resources", sa.Text, nullable=False),
    sa.Column("seen_at", sa.Float, nullable=False),
)

shares = sa.Table(
    "shares",
    metadata,
    sa.Column("kind", sa.Text, primary_key=True),
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("weight", sa.Float, nullable=False),
    sa.Column("limits", sa.Text, nullable=False),
)

pipeline_runs = sa.Table(
    "pipeline_runs",
    metadata,
    sa.Column("seq", _Number, primary_key=True, autoincrement=True),
    sa.Column("id", sa.Text, nullable=False, unique=True),
    sa.Column("pipeline", sa.Text, nullable=False),
    sa.Column("actor", sa.Text, nullable=False),
    sa.Column("cluster", sa.Text, nullable=False),
    sa.Column("storage_url", sa.Text, nullable=False),
    sa.Column("skip_unchanged", sa.Boolean, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("started_at", sa.Float, nullable=False),
    sa.Column("ended_at", sa.Float),
    sa.Index("pipeline_runs_by_state", "state", "seq"),
    sqlite_autoincrement=True,
)

pipeline_steps = sa.Table(
    "pipeline_steps",
    metadata,
    sa.Column("run_id", sa.Text, sa.ForeignKey("pipeline_runs.id"), primary_key=True),
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("number", sa.Integer, nullable=False),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("needs", sa.Text, nullable=False),
    sa.Column("job_id", sa.Text),
    sa.Column("request", sa.Text, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("message", sa.Text, nullable=False),
    sa.Column("mark", sa.Text, nullable=False),
    sa.Column("artifacts", sa.Text, nullable=False),
    sa.Column("started_at", sa.Float),
    sa.Column("ended_at", sa.Float),
    sa.Index("pipeline_steps_by_job", "job_id"),
)

nodes = sa.Table(
    "nodes",
    metadata,
    sa.Column("cluster_id", sa.Text, primary_key=True),
    sa.Column("node_id", sa.Text, primary_key=True),
    sa.Column("cluster", sa.Text, nullable=False),
    sa.Column("address", sa.Text, nullable=False),
    sa.Column("node_type", sa.Text, nullable=False),
    sa.Column("instance_type", sa.Text, nullable=False),
    sa.Column("market", sa.Text, nullable=False),
    sa.Column("resources", sa.Text, nullable=False),
    sa.Column("opened_at", sa.Float, nullable=False),
    sa.Column("seen_at", sa.Float, nullable=False),
    sa.Column("closed_at", sa.Float),
    sa.Column("unseen_s", sa.Float, nullable=False),
    sa.Column("usd_per_hour", sa.Float),
    sa.Column("idle_watts", sa.Float),
    sa.Column("full_watts", sa.Float),
    sa.Column("pue", sa.Float),
    sa.Column("grid_gco2e_per_kwh", sa.Float),
    sa.Column("price_source", sa.Text, nullable=False),
    sa.Column("price_date", sa.Text, nullable=False),
    sa.Index("nodes_by_time", "seen_at"),
)

budgets = sa.Table(
    "budgets",
    metadata,
    sa.Column("team", sa.Text, primary_key=True),
    sa.Column("usd", sa.Float, nullable=False),
    sa.Column("per", sa.Text, nullable=False),
    sa.Column("at_limit", sa.Text, nullable=False),
    sa.Column("period", sa.Text, nullable=False),
    sa.Column("level", sa.Integer, nullable=False),
    sa.Column("spent_usd", sa.Float, nullable=False),
)

cron = sa.Table(
    "cron",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("line", sa.Text, nullable=False),
    sa.Column("timezone", sa.Text, nullable=False),
    sa.Column("request", sa.Text, nullable=False),
    sa.Column("actor", sa.Text, nullable=False),
    sa.Column("checked_at", sa.Float, nullable=False),
    sa.Column("last_id", sa.Text, nullable=False),
)

api_keys = sa.Table(
    "api_keys",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("role", sa.Text, nullable=False),
    sa.Column("digest", sa.Text, nullable=False, unique=True),
    sa.Column("created_at", sa.Float, nullable=False),
)


def url() -> str:
    """The state's URL: `$MANTA_STATE`, else an SQLite file in Manta's home.

    A plain path means an SQLite file.
    """
    given = os.environ.get(URL_VARIABLE)
    if given and "://" in given:
        return given
    home = Path(os.environ.get("MANTA_HOME") or Path.home() / ".manta")
    return f"sqlite:///{Path(given).expanduser().absolute() if given else home / 'state.db'}"


def file_of(url: str) -> Path | None:
    """The SQLite file that `url` names; None for a database server."""
    prefix = "sqlite:///"
    return Path(url.removeprefix(prefix)) if url.startswith(prefix) else None


def shown(url: str) -> str:
    """`url` without its password."""
    return sa.make_url(url).render_as_string(hide_password=True)


class State:
    """One open database. Safe to use from several threads."""

    def __init__(self, engine: sa.Engine) -> None:
        self.engine = engine
        self._watcher: Any = None

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """A transaction that sees one moment of the database."""
        with _explained(self.engine), self.engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """A transaction that holds the write lock; committed at the end of the block."""
        with _explained(self.engine), self.engine.connect() as connection:
            connection = connection.execution_options(manta_write=True)
            with connection.begin():
                if self.engine.dialect.name == "postgresql":
                    connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_ADVISORY_LOCK)))
                yield connection

    def change_mark(self) -> object:
        """A cheap value that differs after another connection has committed."""
        if self.engine.dialect.name == "sqlite":
            return self._data_version()
        with self.read() as connection:
            return connection.execute(sa.select(sa.func.max(events.c.seq))).scalar()

    @property
    def listen_s(self) -> float:
        """How often to look at `change_mark`: microseconds on SQLite, a query on a server."""
        return 0.02 if self.engine.dialect.name == "sqlite" else 0.1

    def close(self) -> None:
        """Close all connections."""
        if self._watcher is not None:
            self._watcher.close()
        self.engine.dispose()

    def _data_version(self) -> object:
        if self._watcher is None:  # counts what *other* connections commit: one of its own
            self._watcher = self.engine.raw_connection()
        cursor = self._watcher.cursor()
        try:
            return cursor.execute("PRAGMA data_version").fetchone()
        finally:
            cursor.close()


def open_state(database_url: str | None = None) -> State:
    """Open the database, and create its tables if it is new.

    Raises:
        InputError: the URL cannot be used, or a Manta of another schema version made the tables.
        MantaError: the database does not answer.
    """
    at = database_url or url()
    if (file := file_of(at)) is not None:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        file.touch(mode=0o600)  # it holds what jobs are given in their environment
    state = State(_engine(at))
    with _explained(state.engine):
        there = set(sa.inspect(state.engine).get_table_names())
    if "manta_meta" in there:
        _check_version(state)
    if metadata.tables.keys() - there:
        _create(state)  # all of them, or those that an earlier Manta had not
    return state


def _engine(at: str) -> sa.Engine:
    try:
        engine = sa.create_engine(at, pool_pre_ping=not at.startswith("sqlite"))
    except (ArgumentError, NoSuchModuleError):
        shown = at.rpartition("@")[2]  # never the password
        raise InputError(
            f"${URL_VARIABLE} `{shown}` is not a database URL",
            "e.g. sqlite:////path/state.db or postgresql+psycopg://user@host/manta",
        ) from None
    except ModuleNotFoundError as error:
        raise InputError(
            f"the driver `{error.name}` of ${URL_VARIABLE} is not installed",
            f"pip install {error.name}",
        ) from None
    if engine.dialect.name == "sqlite":
        sa.event.listen(engine, "connect", _prepare_sqlite)
        sa.event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # `_begin_sqlite` begins, not the driver at its own time
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_S * 1000}")
    cursor.execute("PRAGMA journal_mode = WAL")  # readers never wait for the writer
    cursor.execute("PRAGMA synchronous = FULL")  # what was accepted survives a power cut
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


def _begin_sqlite(connection: sa.Connection) -> None:
    # A transaction that reads first and writes later fails at once if another wrote in between;
    # one that takes the lock at its start waits for it.
    writes = connection.get_execution_options().get("manta_write")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _create(state: State) -> None:
    with state.write() as connection:
        metadata.create_all(connection)  # checks each table: two may start at once
        version = connection.execute(sa.select(meta.c.value)).scalar()
        if version is None:
            row = {"key": "schema_version", "value": str(SCHEMA_VERSION)}
            connection.execute(meta.insert().values(row))


def _check_version(state: State) -> None:
    with state.read() as connection:
        query = sa.select(meta.c.value).where(meta.c.key == "schema_version")
        found = connection.execute(query).scalar()
    if found == str(SCHEMA_VERSION):
        return
    newer = found is not None and int(found) > SCHEMA_VERSION
    raise InputError(
        f"the state has schema version {found}, this Manta knows {SCHEMA_VERSION}",
        "update Manta" if newer else f"keep it and set ${URL_VARIABLE} to a new database",
    )


@contextmanager
def _explained(engine: sa.Engine) -> Iterator[None]:
    try:
        yield
    except sa.exc.IntegrityError:
        raise
    except sa.exc.DataError as error:  # of whoever gave it: the database is well
        reason = " ".join(str(error.orig).split())
        raise InputError(f"the state cannot keep this: {reason}") from None
    except DBAPIError as error:
        shown = engine.url.render_as_string(hide_password=True)
        reason = " ".join(str(error.orig).split())
        raise StateError(f"state {shown}: {reason}", "see that the database is there") from error


class StateError(MantaError):
    """The database does not answer, or is full."""


def now() -> float:
    """UTC seconds; what all times in the state are."""
    return time.time()


def clock(connection: sa.Connection) -> float:
    """UTC seconds by the one clock that all who use the database share: a server's own."""
    if connection.dialect.name != "postgresql":
        return now()
    seconds = sa.extract("epoch", sa.func.clock_timestamp())
    return float(connection.execute(sa.select(seconds)).scalar_one())
