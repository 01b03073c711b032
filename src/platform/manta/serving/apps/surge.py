"""Replacements start before old replicas stop.

Ray's default stops them first: an application of one replica then answers nobody until its
successor is ready, and nobody at all if that one fails (measured in docs/ray-traps.md). Ray's own
option for it, `max_surge_percent`, is per deployment and off; a deploy turns it on for those
deployments of a running application for which its file says nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

OPTION = "max_surge_percent"
SURGE_PERCENT = 100

_UNKNOWN = re.compile(r"Deployment '(.+?)' does not exist\. Available: (\[.*?\])")


def with_surge(app: Mapping[str, Any], deployments: Iterable[str]) -> dict[str, Any]:
    """The entry of a Serve config, with surge for each of the named deployments."""
    entries = {str(entry["name"]): entry for entry in app.get("deployments") or ()}
    for name in deployments:
        entries[name] = {OPTION: SURGE_PERCENT, **entries.get(name, {"name": name})}
    return {**app, "deployments": list(entries.values())} if entries else dict(app)


def without_surge(app: Mapping[str, Any]) -> dict[str, Any]:
    """The entry as its file has it: what `with_surge` adds is left out."""
    entries = [_without(entry) for entry in app.get("deployments") or ()]
    kept = [entry for entry in entries if entry.keys() - {"name"}]
    return {k: v for k, v in app.items() if k != "deployments"} | (
        {"deployments": kept} if kept else {}
    )


def replaced_deployment(message: str) -> tuple[str, str] | None:
    """A deployment that the new version no longer has, and those that it has; or None.

    Serve says so before it touches anything, because `with_surge` names the old ones.
    """
    found = _UNKNOWN.search(message)
    return (found[1], found[2]) if found else None


def _without(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in entry.items() if (k, v) != (OPTION, SURGE_PERCENT)}
