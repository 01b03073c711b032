"""Wait until the minimum workers have joined; name those that do not, their step and their log."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from manta.cluster import cloud_errors, dashboard, hosts, launcher, provider, ssh
from manta.cluster.record import ClusterRecord
from manta.errors import MantaError

POLL_S = 1.0
LOOK_EVERY_S = 5.0
LOG_LINES = 20

STEPS = {
    "": "launch",
    "uninitialized": "launch",
    "waiting-for-ssh": "SSH",
    "syncing-files": "files",
    "setting-up": "set-up commands or `ray start`",
    "update-failed": "set-up",
    "up-to-date": "joining: `ray start` was done and the node is not in Ray's table",
}
"""Ray's tag of a machine → the step that it is at."""

_BEGAN = {
    "Processing file mounts": "files",
    "Running initialization commands": "initialization commands",
    "Running setup commands": "set-up commands",
    "Starting the Ray runtime": "`ray start`",
}
_OWNER = re.compile(r"@(\S+) bash |Fetched IP: (\S+)|NodeUpdater: (\S+):|^\w+@([\w.]+): ")
_PREFIX = re.compile(r"^\S+ \S+\s+\w+ \w+\.py:\d+ -- ")
_NOISE = ("Full command is", "LogTimer", "VINFO", "Shared connection", "Permanently added")


@dataclass(frozen=True, kw_only=True)
class Missing:
    """A worker that has a machine and has not joined."""

    address: str
    step: str


def wait(cluster: ClusterRecord, deadline: float, tell: Callable[[str], None]) -> None:
    """Return when the minimum workers are alive in Ray's node table.

    Raises MantaError that names each worker that is not, its step and the end of its log.
    """
    assert cluster.launched
    wanted, looked, words, told = cluster.launched.num_min_workers, 0.0, "", ""
    while (joined := alive_workers(cluster)) is None or len(joined) < wanted:
        if time.monotonic() > deadline:
            raise _not_joined(cluster, joined or [], wanted)
        if time.monotonic() - looked > LOOK_EVERY_S:
            looked = time.monotonic()
            words = "; ".join(f"{m.address} at {m.step}" for m in missing(cluster, joined or []))
        count = "?" if joined is None else len(joined)
        text = f"{count} of {wanted} workers have joined{'; ' + words if words else ''}"
        if text != told:
            tell(text)
        told = text
        time.sleep(POLL_S)


def alive_workers(cluster: ClusterRecord) -> list[str] | None:
    """Addresses of the workers that are alive in Ray's table; None if the head is silent."""
    try:
        found = dashboard.nodes(cluster)
    except MantaError:
        return None
    return [node.address for node in found if node.state == "ALIVE" and not node.is_head]


def missing(cluster: ClusterRecord, joined: Sequence[str]) -> list[Missing]:
    """Machines of the cluster that are not among `joined`, by address."""
    assert cluster.launched
    on_premise = cluster.launched.provider == launcher.ON_PREMISE
    try:
        found = _on_premise(cluster) if on_premise else _in_cloud(cluster)
    except (MantaError, ValueError, KeyError):
        return []  # only for display: the wait goes on
    return [
        Missing(address=address, step=STEPS.get(step, step))
        for address, step in sorted(found.items())
        if address not in joined
    ]


def _on_premise(cluster: ClusterRecord) -> dict[str, str]:
    """Address → Ray's tag, from the state file that the autoscaler keeps on the head."""
    assert cluster.launched
    command = f"cat {launcher.STATE_FOLDER}/{launcher.state_file(cluster.name)}"
    said = ssh.on_head(cluster, ssh.in_ray(cluster, command))
    if said.code:
        return {}
    return {
        address: info["tags"].get("ray-node-status", "")
        for address, info in json.loads(said.out).items()
        if info["state"] == "running" and info["tags"].get("ray-node-type") == "worker"
    }


def _in_cloud(cluster: ClusterRecord) -> dict[str, str]:
    machines = provider.look(cluster).machines
    return {m.address or m.id: m.step for m in machines if not m.is_head}


def _not_joined(cluster: ClusterRecord, joined: Sequence[str], wanted: int) -> MantaError:
    monitor = _monitor_log(cluster)
    lines = [f"{len(joined)} of {wanted} workers have joined in time"]
    absent = missing(cluster, joined)
    for worker in absent[: max(3, wanted)]:
        lines += _about(cluster, worker, monitor)
    if len(absent) + len(joined) < wanted:
        number = wanted - len(joined) - len(absent)
        lines.append(f"{number} more have no machine; the autoscaler says:")
        error = cloud_errors.explained("it", "\n".join(_complaints(monitor)))
        lines.append(f"  {error}")
    return MantaError(
        "\n".join(lines), "the hosts' logs are quoted above; repeat with --keep to look"
    )


def _about(cluster: ClusterRecord, worker: Missing, monitor: str) -> list[str]:
    said = lines_of(monitor, worker.address)
    began = [step for line in said for words, step in _BEGAN.items() if words in line]
    is_vague = worker.step in (STEPS["setting-up"], STEPS["update-failed"])
    step = began[-1] if began and is_vague else worker.step
    lines = [f"{worker.address} is not there; it is at step: {step}"]
    if said:
        lines.append("  what setting it up said last:")
        lines += [f"    {line}" for line in said[-LOG_LINES:]]
    lines.append("  the end of Ray's log on it:")
    tail = hosts.log_tail(cluster, worker.address)
    return [*lines, *(f"    {line}" for line in tail.splitlines()[-LOG_LINES:])]


def _monitor_log(cluster: ClusterRecord) -> str:
    assert cluster.launched
    logs = f"{cluster.launched.ray_temp_dir}/session_latest/logs"
    command = f"tail -qn 2000 {logs}/monitor.log {logs}/monitor.out {logs}/monitor.err"
    return ssh.on_head(cluster, ssh.in_ray(cluster, command)).out


def lines_of(monitor: str, address: str) -> list[str]:
    """What the autoscaler's log says of setting up one host, oldest first.

    Several hosts are set up at once and most lines do not say whose they are: a line counts for
    the host that was named last, so that now and then a neighbour's stands between.
    """
    lines, owner = [], ""
    for line in re.sub(r"\x1b\[[0-9;]*m", "", monitor).splitlines():
        if named := _OWNER.search(line):
            owner = next(filter(None, named.groups()))
        if owner == address and line.strip() and not any(noise in line for noise in _NOISE):
            lines.append(_PREFIX.sub("", line.rstrip()))
    return lines


def _complaints(monitor: str) -> list[str]:
    words = re.compile(r"Failed|Error|error|Exception|cannot|Insufficient", re.IGNORECASE)
    return [line for line in monitor.splitlines() if words.search(line)][-LOG_LINES:]
