"""What Manta remembers of a cluster that is up: one JSON file each, outside the cluster."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from manta import storage
from manta.errors import InputError

DEFAULT_NAME = "local"


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
            storage.ROOT_VARIABLE: self.storage_url,
        }

    def use(self) -> None:
        """Point this process's Ray clients at the cluster. Call before importing ray."""
        os.environ.update(self.client_environment())


def home() -> Path:
    """Manta's own folder: `$MANTA_HOME`, else ~/.manta."""
    return Path(os.environ.get("MANTA_HOME") or Path.home() / ".manta")


def path(name: str) -> Path:
    """File of the record of cluster `name`."""
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
