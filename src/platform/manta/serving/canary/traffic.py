"""Which share of an application's requests a candidate answers: told to its replicas by storage.

    traffic/REPLICA.json        the order for one replica; rewritten by a deploy while it lives
    traffic/REPLICA.seen.json   what that replica made of it; rewritten by the replica

A file for each replica, as with vitals: nobody but the replicas that a deploy means can follow
it, though clusters share a storage and names, and those of the next version know nothing of it.
An order holds as long as it is repeated. Its number has to stand still for EXPIRY_S of the
*replica's* time, so clocks are not compared and a killed deploy needs nobody to clean up.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from manta import storage
from manta.errors import InputError

FOLDER = "traffic"
BEAT_S = 2.0
"""Between repetitions of an order."""
EXPIRY_S = 10.0
"""After so long without one, the running version answers everything again."""

VERSION_HEADER = "x-manta-version"
"""Of what a candidate answers. What lacks it comes from a proxy: no candidate was there."""

By = Literal["key", "request"]
"""What is drawn once: a client's key, so that it sees one version, or each request."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """What one replica is to do."""

    number: int
    """Grows with each repetition."""
    url: str = ""
    """Where the candidate answers. Empty in the order of a candidate's own replicas."""
    weight: float = 0.0
    """Share of the requests that ask a model which the candidate answers, 0 to 1."""
    shadow: float = 0.0
    """Share of those answered here that the candidate is asked again afterwards."""
    abandon: bool = False
    """Whether what the candidate has not begun to answer is taken back from it."""
    by: By = "key"
    token: str = ""
    """Of this roll-out; says that a copy is one. Also decides which keys are drawn first."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What became of the requests that were sent on by one or more replicas."""

    number: int = 0
    """Of the order that is followed."""
    num_open: int = 0
    """Sent on, and not yet answered to the end."""
    num_sent: int = 0
    """Sent on and settled, copies included."""
    num_failed: int = 0
    """Of these: 5xx, cut, out of reach, or refused though the running version answered."""

    def plus(self, other: Seen) -> Seen:
        """Both together, with the lower number."""
        return Seen(
            number=min(self.number, other.number),
            num_open=self.num_open + other.num_open,
            num_sent=self.num_sent + other.num_sent,
            num_failed=self.num_failed + other.num_failed,
        )


def place(token: str, unit: bytes) -> float:
    """Where a unit stands in [0, 1): always the same in one roll-out, another in the next.

    It gets the candidate at each weight above that, so a higher weight takes nobody back.
    """
    drawn = hashlib.blake2b(unit, key=token.encode()[:64], digest_size=8).digest()
    return int.from_bytes(drawn) / 2**64


def write_order(root: str, replica_id: str, order: Order) -> None:
    """Tell a replica. Raises MantaError if the storage cannot be written."""
    storage.write_json(_file(root, replica_id), asdict(order))


def read_order(root: str, replica_id: str) -> Order | None:
    """The order for a replica; None if there is none or it cannot be read."""
    found: Order | None = _read(_file(root, replica_id), Order)
    return found


def write_seen(root: str, replica_id: str, seen: Seen) -> None:
    """Tell what became of it. Raises MantaError if the storage cannot be written."""
    storage.write_json(_file(root, replica_id, ".seen"), asdict(seen))


def read_seen(root: str, replica_id: str) -> Seen | None:
    """What a replica has told; None if nothing, or it cannot be read."""
    found: Seen | None = _read(_file(root, replica_id, ".seen"), Seen)
    return found


def forget(root: str, replica_id: str) -> None:
    """Delete both files of a replica."""
    for kind in ("", ".seen"):
        storage.delete(_file(root, replica_id, kind))


def _read(url: str, kind: type[Any]) -> Any:
    try:
        value = storage.read_json(url)
        return kind(**{one.name: value[one.name] for one in fields(kind)})
    except (InputError, KeyError, TypeError):
        return None


def _file(root: str, replica_id: str, kind: str = "") -> str:
    return storage.join(root, FOLDER, f"{replica_id}{kind}.json")
