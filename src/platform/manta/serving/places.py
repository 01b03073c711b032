"""Where the story of a cluster's applications lies under its storage root."""

from __future__ import annotations

import socket
import urllib.parse

from manta import storage
from manta.cluster.record import ClusterRecord


def lock(cluster: ClusterRecord) -> str:
    """Folder of the lock on changing the cluster's applications."""
    return storage.join(_cluster(cluster), "lock")


def apps(cluster: ClusterRecord) -> str:
    """Folder with one folder for each application that ever was."""
    return storage.join(_cluster(cluster), "apps")


def app(cluster: ClusterRecord, name: str) -> str:
    """Folder of one application's versions."""
    return storage.join(apps(cluster), urllib.parse.quote(name, safe=""))


def app_name(folder: str) -> str:
    """The application whose folder has this name."""
    return urllib.parse.unquote(folder)


def _cluster(cluster: ClusterRecord) -> str:
    # A cluster on one machine is reached from there only, and many people have one called `local`.
    where = "" if cluster.launched else f"@{socket.gethostname()}"
    return storage.join(cluster.storage_url, "deploys", cluster.name + where)
