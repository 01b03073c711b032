"""The hosts of a launched cluster over SSH: what they hold, what runs on them, their logs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from manta.cluster import ssh
from manta.cluster.processes import CLUSTER_ID_VARIABLE
from manta.cluster.record import ClusterRecord

MAX_AT_ONCE = 16
LOG_LINES = 12

# The cluster's processes are found by what they carry, never by name: see cluster/processes.py.
_MEMBERS = r"""
members() {
  for p in /proc/[0-9]*; do
    grep -qzs -x "%(variable)s=%(id)s" $p/environ \
      && ! grep -q '^State:.Z' $p/status && echo ${p#/proc/}
  done
}
"""

_END = (
    _MEMBERS
    + r"""
ask() { for pid in $(members); do kill -$1 $pid 2>/dev/null; done; }
ask TERM
for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
  [ -z "$(members)" ] && break
  [ $i -gt 8 ] && ask KILL
  sleep 0.25
done
rm -f ~/ray_bootstrap_key.pem ~/ray_bootstrap_config.yaml ~/.ray/auth_token
rm -rf ~/.manta-tls
echo left: $(members)
"""
)

_SIZE = "nproc; awk '/MemTotal/ {print $2}' /proc/meminfo; nvidia-smi -L 2>/dev/null | wc -l"
MEMORY_FOR_TASKS = 0.7


def addresses(cluster: ClusterRecord) -> tuple[str, ...]:
    """The head's and the on-premise workers' addresses."""
    assert cluster.launched
    return tuple(filter(None, (cluster.launched.access.head, *cluster.launched.hosts)))


def resources(cluster: ClusterRecord) -> dict[str, float]:
    """What one on-premise worker offers, in Ray's units: of each the most that any of them has.

    The most, since demand that no host is thought to hold would wait for ever. Empty if no host
    answers.
    """
    assert cluster.launched
    found: dict[str, float] = {}
    for said in _on_all(cluster, cluster.launched.hosts, _SIZE).values():
        numbers = said.out.split()
        if said.code or len(numbers) != 3 or not all(map(str.isdigit, numbers)):
            continue
        cpus, memory_kib, gpus = map(int, numbers)
        memory_bytes = int(memory_kib * 1024 * MEMORY_FOR_TASKS)
        each = {"CPU": float(cpus), "memory": float(memory_bytes), "GPU": float(gpus)}
        found = {name: max(found.get(name, 0.0), each[name]) for name in each}
    return {name: amount for name, amount in found.items() if amount}


def end(cluster: ClusterRecord) -> dict[str, str]:
    """End every process of the cluster on every on-premise host, and remove its secrets there.

    Returns what is wrong by address: processes that are left, or why nothing can be told of the
    host. Empty if nothing of the cluster is left anywhere.
    """
    script = _END % {"variable": CLUSTER_ID_VARIABLE, "id": cluster.cluster_id}
    wrong = {}
    for address, said in _on_all(cluster, addresses(cluster), script).items():
        left = re.search(r"^left: *(.*)$", said.out, re.MULTILINE)
        if left is None:
            wrong[address] = f"cannot be asked ({said.err or said.out or 'no answer'})"
        elif left.group(1):
            wrong[address] = f"processes {left.group(1)} cannot be ended"
    return wrong


def log_tail(cluster: ClusterRecord, address: str) -> str:
    """The end of Ray's own logs on a worker, or why they cannot be read."""
    assert cluster.launched
    logs = f"{cluster.launched.ray_temp_dir}/session_latest/logs"
    files = " ".join(f"{logs}/{name}" for name in ("raylet.out", "raylet.err"))
    command = f"tail -qn {LOG_LINES} {files} 2>/dev/null || echo 'Ray has not written a log there'"
    said = ssh.on_host(cluster, address, ssh.in_ray(cluster, command), timeout_s=15)
    return said.out.strip() or said.err or "its log is empty"


def _on_all(cluster: ClusterRecord, names: Iterable[str], script: str) -> dict[str, ssh.Said]:
    command = f"bash -c {shlex.quote(script)}"
    names = tuple(dict.fromkeys(names))
    with ThreadPoolExecutor(MAX_AT_ONCE) as pool:
        said = pool.map(lambda name: ssh.on_host(cluster, name, command, timeout_s=30), names)
        return dict(zip(names, said, strict=True))
