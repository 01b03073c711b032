"""The SSH tunnel to a launched cluster: opened when first needed, reused, reopened when dead."""

from __future__ import annotations

import fcntl
from dataclasses import replace
from pathlib import Path

from manta.cluster import ports, record, ssh
from manta.cluster.record import ClusterRecord
from manta.errors import InputError, MantaError


def ensure(cluster: ClusterRecord) -> ClusterRecord:
    """The cluster with its tunnel open; other local ports if somebody took the old ones.

    Raises:
        InputError: the cluster has no head yet.
        MantaError: the head cannot be reached; with ssh's own words.
    """
    launched = cluster.launched
    assert launched
    if not launched.access.head:
        raise InputError(
            f"cluster `{cluster.name}` has no head yet",
            f"go on with `manta up {launched.source} --name {cluster.name}`",
        )
    lock = Path(launched.config).with_name("tunnel.lock")
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # two commands at once open one tunnel
        if ssh.master_lives(cluster):
            return cluster
        cluster = _with_free_ports(cluster)
        try:
            ssh.open_master(cluster, forwards(cluster))
        except MantaError as error:
            head = f"head {launched.access.head} of cluster `{cluster.name}`"
            raise MantaError(
                f"the {head} cannot be reached: {error.what}",
                "is the host on, and this machine in its network? see `manta status "
                f"--name {cluster.name}`",
            ) from None
        return cluster


def close(cluster: ClusterRecord) -> None:
    """Close the tunnel; it is no error if it is closed."""
    if cluster.launched and cluster.launched.access.head:
        ssh.close_master(cluster)


def forwards(cluster: ClusterRecord) -> dict[int, int]:
    """Local port → loopback port of the head."""
    assert cluster.launched
    return {
        _port(cluster.dashboard_url): cluster.launched.dashboard_port,
        _port(cluster.serve_url): cluster.launched.serve_port,
        _port(cluster.gcs_address): cluster.launched.gcs_port,
    }


def _with_free_ports(cluster: ClusterRecord) -> ClusterRecord:
    taken = [port for port in forwards(cluster) if not ports.is_free(port)]
    if not taken:
        return cluster
    dashboard, serve, gcs = ports.free(3)
    moved = replace(
        cluster,
        dashboard_url=f"http://{ports.LOOPBACK}:{dashboard}",
        serve_url=f"http://{ports.LOOPBACK}:{serve}",
        gcs_address=f"{ports.LOOPBACK}:{gcs}",
    )
    record.save(moved)
    return moved


def _port(url: str) -> int:
    return int(url.rpartition(":")[2])
