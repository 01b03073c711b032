"""What Manta remembers of a cluster that is up: one JSON file each, outside the cluster."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from manta import storage
from manta.errors import InputError

DEFAULT_NAME = "local"

LOOPBACK_VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Set to 0, Ray stays on 127.0.0.1, as it does on macOS. Otherwise it takes 127.0.0.1 for this
machine's address in the network, binds there and on 0.0.0.0, and a client that is told
127.0.0.1 looks there (ray/_private/services.py, resolve_ip_for_localhost)."""


@dataclass(frozen=True, kw_only=True)
class ClusterRecord:
    """How to reach one running cluster."""

    name: str
    cluster_id: str
    """Random; in the environment of each of the cluster's processes as MANTA_CLUSTER_ID."""
    pid: int
    """Process that holds the cluster's daemons; dead when the cluster is."""
    gcs_address: str
    """host:port of the control store."""
    dashboard_url: str
    """Base URL of the dashboard, job API and Serve API."""
    serve_url: str
    """Base URL of Serve's HTTP proxy."""
    token_path: str
    temp_dir: str
    """Ray's own session logs and sockets."""
    storage_url: str
    started_at: str
    """UTC, ISO 8601."""

    def client_environment(self) -> dict[str, str]:
        """Variables under which plain `ray` and `serve` commands reach this cluster."""
        return {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": self.token_path,
            "RAY_ADDRESS": self.gcs_address,
            "RAY_API_SERVER_ADDRESS": self.dashboard_url,
            "RAY_DASHBOARD_ADDRESS": self.dashboard_url,
            LOOPBACK_VARIABLE: "0",
            storage.ROOT_VARIABLE: self.storage_url,
        }

    def use(self) -> None:
        """Point this process's Ray clients at the cluster. Call before importing ray."""
        os.environ.update(self.client_environment())


def home() -> Path:
    """Manta's own folder: `$MANTA_HOME`, else ~/.manta."""
    return Path(os.environ.get("MANTA_HOME") or Path.home() / ".manta")


_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,39}")


def path(name: str) -> Path:
    """File of the record of cluster `name`. Raises InputError if that cannot be a name."""
    if not _NAME.fullmatch(name):
        raise InputError(
            f"`{name}` cannot name a cluster", "use lower-case letters, digits and dashes"
        )
    return home() / "clusters" / name / "cluster.json"


def save(record: ClusterRecord) -> None:
    """Write the record, atomically."""
    storage.write_json(str(path(record.name)), asdict(record))


def load_all() -> list[ClusterRecord]:
    """Records of all clusters, by name."""
    files = sorted(home().glob("clusters/*/cluster.json"))
    return [ClusterRecord(**json.loads(file.read_text())) for file in files]


def find(name: str = DEFAULT_NAME) -> ClusterRecord:
    """The record of cluster `name`. Raises InputError if there is none."""
    if not path(name).exists():
        others = ", ".join(record.name for record in load_all())
        known = f"known clusters: {others}; or start it" if others else "start it"
        raise InputError(f"no cluster `{name}` is up", f"{known} with `manta up --name {name}`")
    return ClusterRecord(**json.loads(path(name).read_text()))


def forget(name: str) -> None:
    """Delete the record; it is no error if there is none."""
    path(name).unlink(missing_ok=True)
