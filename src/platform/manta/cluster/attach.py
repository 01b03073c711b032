"""Clusters that others started and end: Manta only has their address and a token."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

from manta.cluster import dashboard, record
from manta.cluster.record import ClusterRecord
from manta.errors import InputError, MantaError

SERVE_PORT = 8000
"""Of Serve's HTTP proxy, if nothing else is said."""


def attach(
    name: str, dashboard_url: str, *, token_path: str, serve_url: str, storage_url: str
) -> ClusterRecord:
    """Remember the cluster whose dashboard answers at `dashboard_url`.

    Args:
        name: what it is called here; one that was attached under that name is replaced.
        dashboard_url: of the dashboard, which has the job API; http or https.
        token_path: file with the token; empty if the cluster asks for none.
        serve_url: of Serve's HTTP proxy; empty: port 8000 of the same host.
        storage_url: root under which jobs keep code, logs and results.

    Raises:
        InputError: a name or address that cannot be, or the name of a cluster that Manta started.
        MantaError: it does not answer, or not with this token.
    """
    address = urlsplit(dashboard_url)
    if address.scheme not in ("http", "https") or not address.hostname:
        raise InputError(f"`{dashboard_url}` is no address", "e.g. http://127.0.0.1:8265")
    if record.path(name).exists() and not record.load(name).attached:
        raise InputError(f"cluster `{name}` was started by Manta", "choose another --name")
    found = ClusterRecord(
        name=name,
        cluster_id=_id(name),
        pid=0,
        gcs_address="",
        dashboard_url=dashboard_url.rstrip("/"),
        serve_url=serve_url.rstrip("/") or f"http://{address.hostname}:{SERVE_PORT}",
        token_path=str(Path(token_path).expanduser().absolute()) if token_path else "",
        temp_dir="",
        storage_url=storage_url,
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
        attached=True,
    )
    _require_answer(found)
    record.save(found)
    return found


def _id(name: str) -> str:
    """The same wherever it is attached under that name: who takes over a queue finds its jobs."""
    return hashlib.sha256(f"attached {name}".encode()).hexdigest()[:16]


def detach(name: str) -> None:
    """Forget the cluster. Raises InputError if there is none, or Manta started it."""
    if not record.load(name).attached:
        raise InputError(f"cluster `{name}` was started by Manta", f"manta down --name {name}")
    record.forget(name)


def _require_answer(found: ClusterRecord) -> None:
    try:
        dashboard.nodes(found)
    except MantaError as error:
        token = "its token" if found.token_path else "a token, with --token-file"
        raise MantaError(error.what, f"see that it is there, and give {token}") from None
