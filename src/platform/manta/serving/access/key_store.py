"""Where keys are kept: in the storage that all of a cluster's hosts share, hashes only.

    keys/ID.json          one key; written once
    keys/ID.until-TIME    ends it at TIME (UTC seconds, 0 is at once); written once

Nothing is ever changed in place, so two people who make and revoke keys at the same time, on
whatever machines, cannot undo each other's work, and a name in a listing is enough to end a key.
Whoever may write to the storage can make keys; they could replace the models as well.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from manta import storage
from manta.errors import InputError
from manta.serving.access import keys
from manta.serving.access.keys import Key

FOLDER = "keys"
_UNTIL = ".until-"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A key and when it was or will be ended by somebody."""

    key: Key
    revoked_at: float | None = None

    def ends_at(self) -> float | None:
        """The earlier of revocation and expiry; None if it goes on for ever."""
        return min(
            (t for t in (self.revoked_at, self.key.expires_at) if t is not None), default=None
        )

    def alive(self, now: float) -> bool:
        """Whether the key opens anything at `now`."""
        end = self.ends_at()
        return end is None or now < end


def save(root: str, key: Key) -> None:
    """Store a new key. Raises MantaError if the storage cannot be written."""
    storage.write_json(storage.join(root, FOLDER, f"{key.id}.json"), keys.to_json(key))


def revoke(root: str, key_id: str, at: float, by: str) -> None:
    """End a key at `at`, 0 for at once whatever a host's clock says. Cannot be undone."""
    mark = storage.join(root, FOLDER, f"{key_id}{_UNTIL}{int(at)}")
    storage.write_json(mark, {"by": by, "written_at": time.time()})


def find(root: str, word: str) -> Stored:
    """The key with this id, or the only living one with this name.

    Raises:
        InputError: there is none, or the name is not unique.
    """
    table = read(root)
    if word in table:
        return table[word]
    now = time.time()
    named = [one for one in table.values() if one.key.name == word and one.alive(now)]
    if not named:
        raise InputError(f"no key `{word}` that is still good", "see `manta keys list`")
    if len(named) > 1:
        ids = ", ".join(one.key.id for one in named)
        raise InputError(f"{len(named)} keys are named `{word}`", f"give an id: {ids}")
    return named[0]


def read(root: str, known: Mapping[str, Stored] | None = None) -> dict[str, Stored]:
    """All keys by id. Files of keys in `known` are not read again.

    Raises:
        InputError: the storage cannot be listed.
    """
    known = known or {}
    found: dict[str, Stored] = {}
    ends: dict[str, list[float]] = {}
    # With a pattern this is one listing on an object store, and without a second to look if it is.
    for url in storage.glob(storage.join(root, FOLDER, "*")):
        name = url.rpartition("/")[2]
        key_id, is_end, end = name.partition(_UNTIL)
        if is_end:
            ends.setdefault(key_id, []).append(float(end) if end.isdigit() else 0.0)
        elif name.endswith(".json"):
            key_id = name.removesuffix(".json")
            stored = known.get(key_id) or _read_one(url, key_id)
            if stored:
                found[key_id] = stored
    return {
        key_id: replace(stored, revoked_at=min(ends.get(key_id, []), default=None))
        for key_id, stored in found.items()
    }


def _read_one(url: str, key_id: str) -> Stored | None:
    try:
        key = keys.from_json(storage.read_json(url))
    except (InputError, KeyError, TypeError, ValueError) as error:
        logger.warning("%s is not a key and opens nothing (%s)", url, type(error).__name__)
        return None
    return Stored(key=key) if key.id == key_id else None


@dataclass
class KeyTable:
    """The keys as one replica knows them; `refresh` from time to time."""

    root: str
    _by_id: dict[str, Stored] = field(default_factory=dict)
    _by_hash: dict[str, Stored] = field(default_factory=dict)
    loaded: bool = False
    """Whether it was read at all. Until then nothing opens."""
    _failing: bool = False

    def refresh(self) -> bool:
        """Read the store; if that fails, keep what is known. Returns whether it was read."""
        try:
            self._by_id = read(self.root, self._by_id)
        except Exception as error:  # whatever a storage client raises: serving must go on
            if not self._failing:
                logger.warning("keys cannot be read (%s); the last known stay", error)
            self._failing = True
            return False
        self._by_hash = {stored.key.sha256: stored for stored in self._by_id.values()}
        self.loaded, self._failing = True, False
        return True

    def find(self, secret: bytes) -> Stored | None:
        """The key of this secret, good or not; None if there never was one."""
        return self._by_hash.get(keys.digest(secret))
