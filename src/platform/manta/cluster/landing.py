"""Ends a launched cluster: Ray's launcher asked, then verified that nothing is left."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

from manta.cluster import cloud_errors, hosts, launcher, provider, record, tunnel
from manta.cluster.record import ClusterRecord
from manta.errors import MantaError

RAY_DOWN_TIMEOUT_S = 600.0
GONE_TIMEOUT_S = 180.0
POLL_S = 3.0


def execute(cluster: ClusterRecord, *, unverified: bool = False) -> None:
    """End the cluster, verify it, forget it. Idempotent.

    Args:
        cluster: its record.
        unverified: forget it although something could not be verified.

    Raises MantaError, and keeps the record, if anything is left or cannot be asked.
    """
    assert cluster.launched
    said = _ray_down(cluster)
    left = _left(cluster)
    tunnel.close(cluster)
    if left and not unverified:
        what = "\n".join(f"  {where}: {why}" for where, why in left.items())
        cause = cloud_errors.explained("`ray down`", said) if said else None
        raise MantaError(
            f"not all of cluster `{cluster.name}` is gone, or it cannot be told:\n{what}"
            + (f"\n{cause}" if cause else ""),
            f"repeat `manta down --name {cluster.name}`; --forget forgets it all the same",
        )
    forget(cluster)


def _ray_down(cluster: ClusterRecord) -> str:
    """Run `ray down`; what it said if it failed, else nothing."""
    assert cluster.launched
    config = Path(cluster.launched.config)
    if not config.exists():
        return f"{config} is gone"
    try:
        done = subprocess.run(
            launcher.ray_words("down", cluster),
            executable=launcher.ray_binary(),
            env=provider.environment(config.parent),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=RAY_DOWN_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return f"no end in {RAY_DOWN_TIMEOUT_S:g} s"
    (config.with_name("ray-down.log")).write_text(done.stdout + done.stderr)
    return done.stdout + done.stderr if done.returncode else ""


def _left(cluster: ClusterRecord) -> dict[str, str]:
    """What is left of the cluster and where; empty if nothing is."""
    assert cluster.launched
    if cluster.launched.provider == launcher.ON_PREMISE:
        # `ray down` stops Ray on the head only, and leaves the SSH key that it copied there.
        return hosts.end(cluster)
    deadline = time.monotonic() + GONE_TIMEOUT_S
    while True:
        try:
            machines = provider.look(cluster).machines
        except MantaError as error:
            return {cluster.launched.provider: str(error)}
        if not machines or time.monotonic() > deadline:
            return {machine.id: "still exists" for machine in machines}
        time.sleep(POLL_S)


def forget(cluster: ClusterRecord) -> None:
    """Delete the record of a cluster that is gone; the token and Ray's launcher's logs stay."""
    assert cluster.launched
    record.forget(cluster.name)
    folder = Path(cluster.launched.config).parent
    for name in ("cluster.yaml", "known_hosts", "tunnel.lock"):
        (folder / name).unlink(missing_ok=True)
    for path in (folder / "launcher", folder / "tls", folder / "tls-here", Path(cluster.temp_dir)):
        shutil.rmtree(path, ignore_errors=True)
