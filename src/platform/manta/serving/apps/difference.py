"""What differs between two configs of an application, for people to read before and after."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from manta.check import secrets

Path_ = tuple[str | int, ...]
_SHOWN_CHARS = 80


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[str, ...]:
    """One line for each value that was added, removed or changed; secrets are not shown."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    hidden = {path for config in (old, new) for path, _ in secrets.plain(config)}
    return tuple(
        f"{_name(path)}: {_shown(before, path, hidden)} → {_shown(after, path, hidden)}"
        for path in {**before, **after}
        if before.get(path, _MISSING) != after.get(path, _MISSING)
    )


_MISSING = object()


def _leaves(value: Any, path: Path_ = ()) -> Iterator[tuple[Path_, Any]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _leaves(inner, (*path, key))
    elif isinstance(value, list) and value:
        for number, inner in enumerate(value):
            yield from _leaves(inner, (*path, number))
    else:
        yield path, value


def _name(path: Path_) -> str:
    return ".".join(map(str, path))


def _shown(leaves: Mapping[Path_, Any], path: Path_, hidden: set[Path_]) -> str:
    if path not in leaves:
        return "(none)"
    text = "(secret)" if path in hidden else repr(leaves[path])
    return text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "…"
