"""Empties a node: Ray starts nothing on it any more, Serve moves its replicas, then it ends."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from manta.cluster import dashboard
from manta.cluster.dashboard import Node
from manta.cluster.record import ClusterRecord
from manta.errors import InputError, MantaError

POLL_S = 1.0


def choose(nodes: Sequence[Node], wanted: str) -> Node:
    """The living worker with this address, or whose id begins so. Pure.

    Raises:
        InputError: there is none, there are several, or it is the head.
    """
    alive = [node for node in nodes if node.state == "ALIVE"]
    found = [node for node in alive if wanted and wanted == node.address]
    found = found or [node for node in alive if wanted and node.id.startswith(wanted)]
    workers = ", ".join(f"{n.address} ({n.id[:8]})" for n in alive if not n.is_head)
    if len(found) != 1:
        what = f"{len(found) or 'no'} nodes are `{wanted}`"
        raise InputError(what, f"name one of: {workers}" if workers else "it has no workers")
    if found[0].is_head:
        raise InputError(
            "the head cannot be drained: the cluster ends with it", "see `manta down`"
        )
    return found[0]


def command(node: Node, deadline_s: int | None) -> tuple[str, ...]:
    """The plain `ray` command that does it. Pure."""
    reason = ("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "manta drain")
    words = ("ray", "drain-node", "--node-id", node.id, *reason)
    return (*words, "--deadline-remaining-seconds", str(deadline_s)) if deadline_s else words


def execute(
    cluster: ClusterRecord,
    node: Node,
    deadline_s: int | None,
    timeout_s: float,
    tell: Callable[[str], None],
) -> float:
    """Drain it and wait until it has left the cluster; how long that took, in seconds.

    Raises:
        MantaError: Ray refuses, or the node is still there after `timeout_s`.
    """
    words = command(node, deadline_s)
    began = time.monotonic()
    done = subprocess.run(
        [str(Path(sys.executable).with_name(words[0])), *words[1:]],
        env=os.environ | cluster.client_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise MantaError(f"Ray does not drain {node.address}: {''.join(last)}")
    tell(f"Draining {node.address}: waiting until nothing is left on it")
    while any(one.id == node.id and one.state == "ALIVE" for one in dashboard.nodes(cluster)):
        if time.monotonic() - began > timeout_s:
            raise MantaError(
                f"{node.address} is draining and still there after {timeout_s:g} s",
                "something on it does not end: `ray list actors` shows what; it takes no new work",
            )
        time.sleep(POLL_S)
    return time.monotonic() - began
