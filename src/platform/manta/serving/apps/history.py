"""What each application was: every deploy, rollback and undeploy is a version.

    deploys/CLUSTER/apps/APP/000007.json       what was sent, by whom, over what; written once
    deploys/CLUSTER/apps/APP/000007.end.json   what came of it; written once

In the storage, like keys (docs/decisions/0005): a team shares it, and it outlives the cluster.
Secrets are masked; what a version needs of them is taken from the application that runs.
"""

from __future__ import annotations

import copy
import getpass
import re
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from manta import storage
from manta.check import secrets
from manta.cluster.record import ClusterRecord
from manta.errors import InputError, MantaError
from manta.serving.apps import places
from manta.serving.apps.surge import without_surge

MASK = "(secret, not kept)"
MAX_WHY_CHARS = 500
Action = Literal["deploy", "rollback", "undeploy", "found"]
State = Literal["healthy", "failed", "removed", "left"]

_NAME = re.compile(r"(\d+)(\.end)?\.json")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a version."""

    state: State
    """`left`: nobody waited for it to the end."""
    after_s: float
    why: str = ""
    then: str = ""
    """What was done after a failure."""
    at: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Version:
    """One change of one application."""

    app: str
    number: int
    action: Action
    """`found`: it ran already when Manta first changed it."""
    at: float
    """UTC seconds, by the clock of who changed it."""
    by: str
    cluster_id: str
    file: str = ""
    config_passthrough: Mapping[str, Any] | None = None
    """The entry of the Serve config, in Ray's format; None for an undeploy."""
    masked: tuple[tuple[str | int, ...], ...] = ()
    """Paths of secrets in it."""
    replaced: int | None = None
    """The version that ran before."""
    of: int | None = None
    """The version that a rollback goes back to."""
    outcome: Outcome | None = None
    """None while it is under way, and for ever if whoever changed it was killed."""


def read(home: str, app: str) -> tuple[Version, ...]:
    """All versions of an application, oldest first; empty if there is none.

    `home` is `places.home` of the cluster.
    """
    folder = places.app(home, app)
    matches = [_NAME.fullmatch(url.rpartition("/")[2]) for url in _files(folder)]
    numbers = {(int(match[1]), bool(match[2])) for match in matches if match}
    return tuple(
        _read(folder, number, ended=(number, True) in numbers)
        for number, is_end in sorted(numbers)
        if not is_end
    )


def apps(home: str) -> tuple[str, ...]:
    """Names of all applications that have a history."""
    folder = places.apps(home)
    files = storage.glob(storage.join(folder, "*", "*.json"))
    return tuple(sorted({places.app_name(url.split("/")[-2]) for url in files}))


def begin(
    cluster: ClusterRecord,
    app: str,
    action: Action,
    config: Mapping[str, Any] | None,
    *,
    file: str = "",
    replaced: int | None = None,
    of: int | None = None,
) -> Version:
    """Note a version that is about to be sent. Hold the cluster's lock.

    Raises:
        MantaError: the storage cannot be written, or another process wrote this version.
    """
    known = read(places.home(cluster), app)
    kept, masked = mask(without_surge(config)) if config is not None else (None, ())
    version = Version(
        app=app,
        number=known[-1].number + 1 if known else 1,
        action=action,
        at=time.time(),
        by=f"{getpass.getuser()}@{socket.gethostname()}",
        cluster_id=cluster.cluster_id,
        file=file,
        config_passthrough=kept,
        masked=masked,
        replaced=replaced,
        of=of,
    )
    if not storage.write_new(_file(cluster, version), _to_json(version)):
        raise MantaError(f"version {version.number} of `{app}` was written by another process")
    return version


def end(
    cluster: ClusterRecord, version: Version, state: State, why: str = "", then: str = ""
) -> None:
    """Note what came of a version. Raises MantaError if the storage cannot be written."""
    why, now = (MASK if any(secrets.plain([why])) else why)[:MAX_WHY_CHARS], time.time()
    after_s = round(max(0.0, now - version.at), 1)
    outcome = Outcome(state=state, after_s=after_s, why=why, then=then, at=now)
    storage.write_new(_file(cluster, version, ".end"), asdict(outcome))


def find(config: Mapping[str, Any] | None, versions: Sequence[Version]) -> Version | None:
    """The newest version that has this config, which runs; None if it has none."""
    if config is None:
        return None
    kept, _ = mask(without_surge(config))
    return next((v for v in reversed(versions) if v.config_passthrough == kept), None)


def before(versions: Sequence[Version], running: Version | None) -> Version:
    """The version to go back to: the last healthy one before `running` that was another.

    Raises:
        InputError: there is none.
    """
    limit = running.number if running else versions[-1].number + 1 if versions else 0
    config = running.config_passthrough if running else None
    for version in reversed(versions):
        good = version.outcome is not None and version.outcome.state == "healthy"
        if version.number < limit and good and version.config_passthrough not in (None, config):
            return version
    raise InputError(
        "there is no healthy version before the one that runs",
        "see `manta apps history`, and name one with --to",
    )


def numbered(versions: Sequence[Version], number: int) -> Version:
    """The version of that number. Raises InputError if there is none that can run."""
    for version in versions:
        if version.number == number and version.config_passthrough is not None:
            return version
    known = ", ".join(str(v.number) for v in versions if v.config_passthrough is not None)
    raise InputError(f"no version {number}", f"known: {known or 'none'}")


def mask(
    config: Mapping[str, Any],
) -> tuple[dict[str, Any], tuple[tuple[str | int, ...], ...]]:
    """The config without its secrets, as `manta check` knows them, and where they stood."""
    kept = copy.deepcopy(dict(config))
    paths = tuple(path for path, _ in secrets.plain(kept))
    for path in paths:
        _set(kept, path, MASK)
    return kept, paths


def unmask(version: Version, running: Mapping[str, Any] | None) -> dict[str, Any]:
    """The config of a version, its secrets taken from the application as it runs now.

    Raises:
        InputError: a secret has no counterpart there.
    """
    config = copy.deepcopy(dict(version.config_passthrough or {}))
    for path in version.masked:
        value = _get(running, path)
        if not isinstance(value, str):
            raise InputError(
                f"version {version.number} of `{version.app}` had a secret at "
                f"`{'.'.join(map(str, path))}`, which is not kept",
                "deploy its file again, and keep secrets out of it",
            )
        _set(config, path, value)
    return config


def _get(value: Any, path: Sequence[str | int]) -> Any:
    for part in path:
        try:
            value = value[part]
        except (KeyError, IndexError, TypeError):
            return None
    return value


def _set(value: Any, path: Sequence[str | int], new: str) -> None:
    for part in path[:-1]:
        value = value[part]
    value[path[-1]] = new


def _files(folder: str) -> list[str]:
    return storage.glob(storage.join(folder, "*.json"))


def _file(cluster: ClusterRecord, version: Version, kind: str = "") -> str:
    return storage.join(
        places.app(places.home(cluster), version.app), f"{version.number:06}{kind}.json"
    )


def _to_json(version: Version) -> dict[str, Any]:
    value = asdict(version)
    del value["outcome"]  # in its own file
    return value


def _read(folder: str, number: int, ended: bool) -> Version:
    value = storage.read_json(storage.join(folder, f"{number:06}.json"))
    known = {one.name: value[one.name] for one in fields(Version) if one.name in value}
    outcome = (
        Outcome(**storage.read_json(storage.join(folder, f"{number:06}.end.json")))
        if (ended)
        else None
    )
    masked = tuple(tuple(path) for path in known.pop("masked", ()))
    return Version(**{**known, "masked": masked, "outcome": outcome})
