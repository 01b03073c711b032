"""The laptop of the lab: a home of its own, from which `manta` and plain `ray` commands run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hosts import Host, Lab

BIN = Path(sys.executable).parent
# Small, so that four hosts fit on two cores; the worker's CPUs are logical.
HEAD = (
    "ray start --head --port=6379 --num-cpus=0 --object-store-memory=100000000 "
    "--autoscaling-config=~/ray_bootstrap_config.yaml"
)
WORKER = (
    "export RAY_raylet_start_wait_time_s=120; "  # four hosts share what may be two cores
    "ray start --address=$RAY_HEAD_IP:6379 --num-cpus=2 --object-store-memory=100000000"
)

REPLICAS = """
import json
from manta.cluster import dashboard, record
cluster = record.find("%s")
app = dashboard.get(cluster, "/api/serve/applications/")["applications"].get("%s")
deployments = app["deployments"].values() if app else ()
replicas = [one for deployment in deployments for one in deployment["replicas"]]
print(json.dumps([one["node_ip"] for one in replicas if one["state"] == "RUNNING"]))
"""


class Laptop:
    """Commands run in the switch's network, with a home in the lab's folder."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.home = lab.folder / "laptop"
        self.home.mkdir(exist_ok=True)
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MANTA_"))}
        self.environment = kept | {"HOME": str(self.home)}

    def run(
        self, *words: str, timeout_s: float = 400, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run one of this Python's commands."""
        return subprocess.run(
            self.lab.laptop(str(BIN / words[0]), *words[1:]),
            env=self.environment | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )

    def write(self, name: str, **changes: Any) -> Path:
        """A cluster YAML for the lab's hosts: the first is the head, two of the others join."""
        workers = [host.address for host in self.lab.hosts[1:]]
        config: dict[str, Any] = {
            "cluster_name": name,
            "min_workers": 2,
            "max_workers": 3,
            "upscaling_speed": 10.0,
            "idle_timeout_minutes": 0.2,
            "provider": {
                "type": "local",
                "head_ip": self.lab.hosts[0].address,
                "worker_ips": workers,
            },
            "auth": {"ssh_user": "root", "ssh_private_key": str(self.lab.key)},
            "head_start_ray_commands": ["ray stop", HEAD],
            "worker_start_ray_commands": ["ray stop", WORKER],
        }
        path = self.home / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config | changes))
        return path

    def status(self, name: str) -> dict[str, Any]:
        """What `manta status --json` says."""
        done = self.run("manta", "status", "--name", name, "--json")
        assert done.stdout, done.stderr
        value: dict[str, Any] = json.loads(done.stdout)
        return value

    def workers(self, name: str) -> dict[str, str]:
        """Node id of each worker that is alive, by address."""
        nodes = self.status(name)["nodes"]
        return {n["address"]: n["id"] for n in nodes if n["state"] == "ALIVE" and not n["is_head"]}

    def replica_nodes(self, name: str, app: str) -> list[str]:
        """Address of the node of each replica of an application that runs."""
        told = self.run("python", "-c", REPLICAS % (name, app))
        assert told.returncode == 0, told.stderr
        addresses: list[str] = json.loads(told.stdout.splitlines()[-1])
        return addresses

    def variables(self, name: str) -> dict[str, str]:
        """What `manta env` prints."""
        done = self.run("manta", "env", "--name", name, "--json")
        assert done.returncode == 0, done.stderr
        value: dict[str, str] = json.loads(done.stdout)
        return value

    def submit(self, name: str, job: str, code: str) -> None:
        """Submit Python code as a job with plain Ray; returns when it is accepted."""
        words = ["--no-wait", "--submission-id", job, "--", "python", "-c", code]
        done = self.run("ray", "job", "submit", *words, **self.variables(name))
        assert done.returncode == 0, done.stderr

    def job(self, name: str, job: str) -> tuple[str, str]:
        """State and log of a job; the log is the later of the two."""
        variables = self.variables(name)
        status = self.run("ray", "job", "status", job, **variables).stdout.upper()
        logs = self.run("ray", "job", "logs", job, **variables).stdout
        states = ("SUCCEEDED", "FAILED", "STOPPED", "RUNNING", "PENDING")
        return next((s for s in states if s in status.split(job.upper())[-1]), status), logs

    def finished(self, name: str, job: str, timeout_s: float = 400) -> str:
        """The log of a job when it has succeeded."""
        said: list[tuple[str, str]] = []

        def ended() -> bool:
            said.append(self.job(name, job))
            return said[-1][0] not in ("RUNNING", "PENDING")

        wait_until(ended, timeout_s, lambda: said[-1][1])
        assert said[-1][0] == "SUCCEEDED", said[-1][1]
        return said[-1][1]


def wait_until(
    condition: Callable[[], object], timeout_s: float, what: Callable[[], object] = lambda: ""
) -> None:
    """Poll until the condition holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"did not happen in {timeout_s} s: {what()}"
        time.sleep(0.5)


def processes(lab: Lab, host: Host) -> list[str]:
    """Command lines of all processes of a host."""
    shown = subprocess.run(
        lab.inside(host, "ps", "-eo", "args", "--no-headers"), capture_output=True, text=True
    )
    assert shown.returncode == 0, shown.stderr
    return shown.stdout.splitlines()


def ray_processes(lab: Lab, host: Host) -> list[str]:
    """Those that are Ray's."""
    marks = ("gcs_server", "raylet", "ray::", "/ray/")
    return [line for line in processes(lab, host) if any(mark in line for mark in marks)]


def listening(lab: Lab, host: Host) -> dict[int, set[str]]:
    """Port → addresses (hexadecimal, as the kernel shows them) that a host listens on."""
    tables = "cat /proc/net/tcp /proc/net/tcp6"
    shown = subprocess.run(lab.inside(host, "sh", "-c", tables), capture_output=True, text=True)
    found: dict[int, set[str]] = {}
    for line in shown.stdout.splitlines():
        words = line.split()
        if len(words) > 3 and words[3] == "0A":  # LISTEN
            address, _, port = words[1].partition(":")
            found.setdefault(int(port, 16), set()).add(address)
    return found


LOOPBACK = ("0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F")


def reachable(lab: Lab, host: Host) -> list[int]:
    """Ports of a host that others could reach: those not on loopback only."""
    return sorted(port for port, on in listening(lab, host).items() if on - set(LOOPBACK))


def ask_everything(
    words: Sequence[str],
    ports: Mapping[str, list[int]],
    routes: Sequence[Sequence[str]],
    *token: str,
) -> list[list[Any]]:
    """What answers, asked by way of `words`, a command line prefix; without a token if none."""
    script = str(Path(__file__).with_name("probe.py"))
    asked = [*words, sys.executable, script, json.dumps(ports), json.dumps(routes), *token]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    found: list[list[Any]] = json.loads(done.stdout.splitlines()[-1])
    return found
