"""Where the story of a cluster's applications lies under its storage root."""

from __future__ import annotations

import socket
import urllib.parse

from manta import storage
from manta.cluster.record import ClusterRecord

FOLDER = "deploys"


def home(cluster: ClusterRecord) -> str:
    """Folder of all that is known of the cluster's applications."""
    # A cluster on one machine is reached from there only, and many people have one called `local`.
    where = "" if cluster.launched else f"@{socket.gethostname()}"
    return storage.join(cluster.storage_url, FOLDER, cluster.name + where)


def home_of_gone(name: str, storage_url: str) -> str:
    """The folder of a cluster that is not up: of one on this machine, else of a launched one."""
    here = storage.join(storage_url, FOLDER, f"{name}@{socket.gethostname()}")
    return here if storage.exists(here) else storage.join(storage_url, FOLDER, name)


def lock(cluster: ClusterRecord) -> str:
    """Folder of the lock on changing the cluster's applications."""
    return storage.join(home(cluster), "lock")


def apps(home: str) -> str:
    """Folder with one folder for each application that ever was."""
    return storage.join(home, "apps")


def app(home: str, name: str) -> str:
    """Folder of one application's versions."""
    return storage.join(apps(home), urllib.parse.quote(name, safe=""))


def app_name(folder: str) -> str:
    """The application whose folder has this name."""
    return urllib.parse.unquote(folder)
