"""Keeps Ray's own logs of a launched cluster, which lie on hosts that are about to be ended."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath

from manta.cluster import dashboard, record
from manta.cluster.record import ClusterRecord
from manta.errors import MantaError


def keep(cluster: ClusterRecord, tell: Callable[[str], None]) -> Path:
    """Copy the log files of all nodes that are alive; returns the folder, with one for each node.

    What cannot be copied is told and left out. Raises MantaError if the cluster is silent.
    `tell` hears where they are, too.
    """
    now = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    folder = record.home() / "clusters" / cluster.name / f"ray-logs-{now}"
    folder.mkdir(mode=0o700, parents=True)
    for node in dashboard.nodes(cluster):
        if node.state != "ALIVE":
            tell(f"{node.address}: is {node.state.lower()}, its logs are not kept")
            continue
        try:
            names = dashboard.log_files(cluster, node.id)
        except MantaError as error:
            tell(f"{node.address}: its logs are not kept: {error.what}")
            continue
        for name in names:
            _keep_one(cluster, node, name, folder / node.address, tell)
        tell(f"{node.address}: {len(names)} files of logs")
    tell(f"Ray's logs are kept in {folder}")  # now: what follows may fail
    return folder


def _keep_one(
    cluster: ClusterRecord,
    node: dashboard.Node,
    name: str,
    folder: Path,
    tell: Callable[[str], None],
) -> None:
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        return  # a node says what its files are called, and none belongs elsewhere
    try:
        dashboard.save_log(cluster, node.id, name, folder / name)
    except MantaError as error:
        tell(f"{node.address}: {name} is not kept: {error.what}")
