"""What Manta remembers of a cluster: one JSON file each, outside the cluster."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from manta import storage
from manta.errors import InputError

DEFAULT_NAME = "local"

LOOPBACK_VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Set to 0, Ray stays on 127.0.0.1, as it does on macOS. Otherwise it takes 127.0.0.1 for this
machine's address in the network, binds there and on 0.0.0.0, and a client that is told
127.0.0.1 looks there (ray/_private/services.py, resolve_ip_for_localhost)."""


@dataclass(frozen=True, kw_only=True)
class Access:
    """How to log in to the hosts of a cluster that Ray's launcher started."""

    head: str
    """The head's address as seen from this machine; empty until there is a head."""
    user: str
    key: str | None
    """Path of the private key; None leaves the choice to ssh and its agent."""
    proxy_command: str | None = None


@dataclass(frozen=True, kw_only=True)
class Launched:
    """What is remembered of a cluster that Ray's launcher started."""

    provider: str
    """Ray's name of it: local (on-premise), aws, gcp, azure …"""
    source: str
    """The user's cluster YAML, absolute."""
    config: str
    """What `ray up` was given: the user's file and what closes the cluster."""
    is_up: bool
    """Whether it was up and whole once; before that `manta up` goes on with it."""
    access: Access
    hosts: tuple[str, ...] = ()
    """Addresses of on-premise workers; those of other providers come and go."""
    container: str | None = None
    """Name of the container that Ray runs in on each host."""
    num_min_workers: int = 0
    dashboard_port: int = 8265
    """On the head, as are the two below."""
    gcs_port: int = 6379
    serve_port: int = 8000
    ray_temp_dir: str = "/tmp/ray"
    tls: bool = False
    prices: tuple[str, ...] = ()
    """The user's price files, absolute."""


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
    """Empty if the cluster asks for no token, which only one that was attached may."""
    temp_dir: str
    """Ray's own session logs and sockets."""
    storage_url: str
    started_at: str
    """UTC, ISO 8601."""
    launched: Launched | None = None
    """Set if Ray's launcher started it; None for a cluster on this machine, or one attached."""
    attached: bool = False
    """Whether others started it, and end it: KubeRay, a plain `ray up` or `ray start`."""

    @property
    def is_here(self) -> bool:
        """Whether its processes are this machine's, started by Manta."""
        return self.launched is None and not self.attached

    def client_environment(self) -> dict[str, str]:
        """Variables under which plain `ray` and `serve` commands reach this cluster."""
        variables = {
            "RAY_AUTH_MODE": "token" if self.token_path else "disabled",
            "RAY_AUTH_TOKEN_PATH": self.token_path,
            "RAY_API_SERVER_ADDRESS": self.dashboard_url,
            "RAY_DASHBOARD_ADDRESS": self.dashboard_url,
            storage.ROOT_VARIABLE: self.storage_url,
        }
        if not self.attached:
            variables |= {"RAY_ADDRESS": self.gcs_address, LOOPBACK_VARIABLE: "0"}
        if self.launched and self.launched.tls:
            from manta.cluster import tls

            variables |= tls.client_environment(Path(self.launched.config).parent)
        return variables

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
    return [_read(file) for file in sorted(home().glob("clusters/*/cluster.json"))]


def load(name: str) -> ClusterRecord:
    """The record of cluster `name`. Raises InputError if there is none."""
    if not path(name).exists():
        others = ", ".join(record.name for record in load_all())
        known = f"known clusters: {others}; or start it" if others else "start it"
        raise InputError(f"no cluster `{name}` is up", f"{known} with `manta up --name {name}`")
    return _read(path(name))


def find(name: str = DEFAULT_NAME) -> ClusterRecord:
    """The record of cluster `name`, within reach: its tunnel is open when this returns.

    Raises:
        InputError: there is no such cluster.
        MantaError: its head cannot be reached.
    """
    found = load(name)
    if found.launched is None:
        return found
    from manta.cluster import tunnel

    return tunnel.ensure(found)


def forget(name: str) -> None:
    """Delete the record; it is no error if there is none."""
    path(name).unlink(missing_ok=True)


def _read(file: Path) -> ClusterRecord:
    value: dict[str, Any] = json.loads(file.read_text())
    launched = value.pop("launched", None)
    if launched:
        launched["access"] = Access(**launched["access"])
        launched |= {name: tuple(launched[name]) for name in ("hosts", "prices")}
        value["launched"] = Launched(**launched)
    return ClusterRecord(**value)
