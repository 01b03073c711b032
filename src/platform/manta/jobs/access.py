"""Keys of the HTTP API: who may do what. Only their hashes are kept."""

from __future__ import annotations

import hashlib
import re
import secrets
from dataclasses import dataclass
from enum import IntEnum

import sqlalchemy as sa

from manta.errors import InputError
from manta.state import State, api_keys, events, now


class Role(IntEnum):
    """What a key is for; each may do all that those before it may."""

    VIEWER = 1
    """Read."""
    SUBMITTER = 2
    """Submit jobs; stop and retry its own."""
    ADMIN = 3
    """Stop and retry anybody's; set quotas."""


@dataclass(frozen=True, kw_only=True)
class Key:
    """One key, without its secret."""

    name: str
    role: Role
    created_at: float


def add(state: State, name: str, role: Role, actor: str) -> str:
    """Make a key; returns the secret, which is shown this once. Raises InputError if taken."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,39}", name):
        raise InputError(f"`{name}` cannot name a key", "use lower-case letters, digits, dashes")
    secret = f"manta_{secrets.token_urlsafe(32)}"
    with state.write() as connection:
        if connection.execute(sa.select(api_keys).where(api_keys.c.name == name)).first():
            raise InputError(f"there is a key {name}", "remove it first, or choose another name")
        row = {"name": name, "role": role.name.lower(), "created_at": now()}
        connection.execute(api_keys.insert().values(**row, digest=_digest(secret)))
        _note(connection, actor, "key added", f"{name}, {role.name.lower()}")
    return secret


def remove(state: State, name: str, actor: str) -> None:
    """Withdraw a key: the next request with it is refused. Raises InputError if there is none."""
    with state.write() as connection:
        gone = connection.execute(api_keys.delete().where(api_keys.c.name == name))
        if not gone.rowcount:
            raise InputError(f"there is no key {name}", "list them with `manta access`")
        _note(connection, actor, "key removed", name)


def listed(state: State) -> list[Key]:
    """All keys, by name."""
    with state.read() as connection:
        return [_key(row) for row in connection.execute(sa.select(api_keys).order_by("name"))]


def find(state: State, secret: str) -> Key | None:
    """The key with that secret; None if there is none."""
    query = sa.select(api_keys).where(api_keys.c.digest == _digest(secret))
    with state.read() as connection:
        row = connection.execute(query).one_or_none()
    return _key(row) if row else None


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode(errors="replace")).hexdigest()  # 256 random bits: no salt


def _key(row: sa.Row[tuple[str, str, str, float]]) -> Key:
    return Key(name=row.name, role=Role[row.role.upper()], created_at=row.created_at)


def _note(connection: sa.Connection, actor: str, kind: str, text: str) -> None:
    row = {"at": now(), "actor": actor, "kind": kind, "job_id": "", "cluster": "", "text": text}
    connection.execute(events.insert().values(**row))
