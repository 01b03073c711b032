"""Applications that a cluster ran when it died, deployed again on the one that replaces it.

Serve keeps what it runs in the head's memory; the storage has each version (history.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from manta.cluster.record import ClusterRecord
from manta.errors import MantaError
from manta.serving import rollout
from manta.serving.apps import deploy, history, places
from manta.serving.apps.deploy import Say
from manta.serving.apps.history import Version


def lost(cluster: ClusterRecord, died: str | None = None) -> tuple[Version, ...]:
    """The versions that ran on an earlier cluster of this name, of applications not here now.

    Args:
        cluster: the one that is up.
        died: id of the earlier cluster; None: the last one on which something was changed.
    """
    home = places.home(cluster)
    found = [in_force(history.read(home, app)) for app in history.apps(home)]
    earlier = [v for v in found if v is not None and v.cluster_id != cluster.cluster_id]
    if died is None and earlier:
        died = max(earlier, key=lambda version: version.at).cluster_id
    here = {app.name for app in deploy.state(cluster).apps}
    return tuple(v for v in earlier if v.cluster_id == died and v.app not in here)


def in_force(versions: Sequence[Version]) -> Version | None:
    """The version that an application ran last, by what is noted; None if it was removed.

    A change that failed, or whose end nobody saw, does not count: what it replaced does.
    """
    numbered = {version.number: version for version in versions}
    version = versions[-1] if versions else None
    while version is not None:
        state = version.outcome.state if version.outcome else "left"
        if state in ("healthy", "removed"):
            break
        version = numbered.get(version.replaced or 0)
    return None if version is None or version.config_passthrough is None else version


def deploy_again(cluster: ClusterRecord, versions: Sequence[Version], say: Say) -> list[str]:
    """Deploy each of them as it was, and wait for it; the names of those that do not run now.

    One that fails keeps none of the others from running: why is told, and is in the history.
    """
    failed = []
    for version in versions:
        say(f"`{version.app}` ran here: deploying version {version.number} again")
        try:
            rollout.roll_back(cluster, version.app, version.number, say)
        except MantaError as error:
            say(f"`{version.app}` is not restored: {error}")
            failed.append(version.app)
    return failed
