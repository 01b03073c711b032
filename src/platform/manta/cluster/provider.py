"""Ray's node provider asked from outside: which machines exist, how to log in to the head.

Runs as a process of its own (`python -m manta.cluster.provider FILE`), since Ray's launcher
prints, exits, and takes its temporary folder from the environment.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from manta.cluster import cloud_errors
from manta.cluster.record import Access, ClusterRecord
from manta.errors import MantaError

TIMEOUT_S = 120.0


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A machine that the provider has and has not ended."""

    id: str
    is_head: bool
    address: str
    """As the other machines see it."""
    node_type: str
    step: str
    """Ray's tag: uninitialized, waiting-for-ssh, syncing-files, setting-up, up-to-date …"""


@dataclass(frozen=True, kw_only=True)
class Existing:
    """What a provider has of one cluster."""

    access: Access
    """With the head's address, and the key that Ray may have made; no head: empty address."""
    machines: tuple[Machine, ...]


def environment(folder: Path) -> dict[str, str]:
    """For Ray's launcher: its state and caches in this cluster's folder, not shared in /tmp.

    They outlive a reboot there, and two clusters of one name do not meet.
    """
    temp = folder / "launcher"
    temp.mkdir(mode=0o700, parents=True, exist_ok=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return kept | {
        "TMPDIR": str(temp),
        "RAY_TMPDIR": str(temp),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_UP_enable_autoscaler_v2": "1",
        "PYTHONUNBUFFERED": "1",
    }


def look(cluster: ClusterRecord) -> Existing:
    """Ask the provider. Raises MantaError with the cloud's message."""
    assert cluster.launched
    folder = Path(cluster.launched.config).parent
    try:
        done = subprocess.run(
            [sys.executable, "-m", "manta.cluster.provider", cluster.launched.config],
            env=environment(folder),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        raise MantaError(f"the provider did not answer in {TIMEOUT_S:g} s") from None
    if done.returncode:
        raise cloud_errors.explained("the provider does not answer", done.stdout + done.stderr)
    value = json.loads(done.stdout.splitlines()[-1])
    return Existing(
        access=Access(**value["access"]),
        machines=tuple(Machine(**machine) for machine in value["machines"]),
    )


def _existing(file: str) -> Existing:
    import yaml
    from ray.autoscaler._private.commands import _bootstrap_config
    from ray.autoscaler._private.providers import _get_node_provider

    config = _bootstrap_config(yaml.safe_load(Path(file).read_text()))
    provider = _get_node_provider(config["provider"], config["cluster_name"])
    internal = config["provider"].get("use_internal_ips", False)
    auth, head, machines = config["auth"], "", []
    for node in provider.non_terminated_nodes({}):
        tags = provider.node_tags(node)
        is_head = tags.get("ray-node-type") == "head"
        if is_head:
            address = provider.internal_ip if internal else provider.external_ip
            by_id = auth.get("ssh_proxy_use_node_id")  # e.g. AWS's session manager
            head = str(node) if by_id else address(node) or ""
        machines.append(
            Machine(
                id=str(node),
                is_head=is_head,
                address=provider.internal_ip(node) or "",
                node_type=tags.get("ray-user-node-type", ""),
                step=tags.get("ray-node-status", ""),
            )
        )
    return Existing(
        access=Access(
            head=head,
            user=auth.get("ssh_user", ""),
            key=auth.get("ssh_private_key"),
            proxy_command=auth.get("ssh_proxy_command"),
        ),
        machines=tuple(machines),
    )


if __name__ == "__main__":
    print(json.dumps(asdict(_existing(sys.argv[1]))))
