"""The controller as a team runs it: PostgreSQL, two of them, as the shipped service files say."""

from __future__ import annotations

import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from configparser import RawConfigParser
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from terminal import MANTA, Terminal, new_terminal, until

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from queue_state import postgresql

QUEUE = Path(__file__).parents[2] / "cluster" / "queue"


@dataclass
class Team:
    """A cluster that others started, a database, and a folder for each machine."""

    owner: Terminal
    """Who started the cluster, and knows nothing of the team."""
    state: str
    storage: str
    folder: Path

    def machine(self, name: str, **variables: str) -> Terminal:
        environment = self.owner.environment | {"MANTA_HOME": str(self.folder / name)}
        environment |= {"MANTA_STATE": self.state, "MANTA_STORAGE": self.storage}
        return replace(self.owner, environment=environment | variables)


@pytest.fixture
def team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    pytest.importorskip("psycopg", reason="no PostgreSQL driver")
    with ExitStack() as stack:
        server = stack.enter_context(postgresql())
        owner = new_terminal(tmp_path_factory)
        owner(MANTA, "up", "--ports", "auto")
        stack.callback(owner, MANTA, "down", "--yes")
        folder = tmp_path_factory.mktemp("team")
        state = f"postgresql+psycopg://manta@/postgres?host={server}"
        yield Team(owner=owner, state=state, storage=str(folder / "storage"), folder=folder)


def test_two_controllers_of_the_shipped_files_take_over_from_each_other(team: Team) -> None:
    """The pod's commands on one machine, the unit's on another; the first is killed."""
    pod = _pod()
    url = team.owner.json("status")["dashboard_url"]
    token = str(team.owner.home / "clusters" / "local" / "auth_token")
    attach = _with(pod["initContainers"][0], {"http://raycluster-head-svc.ray:8265": url})
    attach = [token if word == "/etc/manta/ray/token" else word for word in attach]
    user, first, second = (team.machine(name) for name in ("user", "pod", "host"))
    for machine in (user, first, second):
        machine(*attach)
    port, other = _free_port(), _free_port()
    queue = _with(pod["containers"][0], {"0.0.0.0:8400": f"127.0.0.1:{port}"})
    unit = shlex.split(_unit()["Service"]["ExecStart"])
    unit = [MANTA, *(w.replace(":8400", f":{other}") for w in unit[1:])]
    working = first.start(*queue)
    _until_answers(
        f"http://127.0.0.1:{port}{pod['containers'][0]['readinessProbe']['httpGet']['path']}"
    )
    waiting = second.start(*unit)
    try:
        job = (MANTA, "submit", "--cluster", "gpu", "--id")
        assert "one" in user(*job, "a", "--", "echo", "one").stdout
        working.send_signal(signal.SIGKILL)
        working.wait()
        begun = time.monotonic()
        assert "two" in user(*job, "b", "--", "echo", "two").stdout
        print(f"taken over, and a job run, {time.monotonic() - begun:.1f} s after kill -9")
        assert [j["status"] for j in user.json("jobs")] == ["SUCCEEDED"] * 2
        _until_answers(f"http://127.0.0.1:{other}/healthz")
        waiting.send_signal(signal.SIGTERM)
        output, _ = waiting.communicate(timeout=20)
        assert waiting.returncode == 0, output
    finally:
        working.kill()
        waiting.kill()


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze on this machine")
    text = (QUEUE / "manta-queue.service").read_text()
    here = text.replace("/opt/manta/.venv/bin/manta", MANTA).replace("User=manta", "User=daemon")
    unit = tmp_path / "manta-queue.service"
    unit.write_text(here)
    done = subprocess.run(
        ["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_what_the_deployment_names_is_there() -> None:
    pod = _pod()
    volumes = {volume["name"] for volume in pod["volumes"]}
    for container in (*pod["initContainers"], *pod["containers"]):
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes
        assert container["securityContext"]["readOnlyRootFilesystem"]
        assert container["env"] == [{"name": "MANTA_HOME", "value": "/var/lib/manta"}]
    deployment, service, budget = _documents()
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    selected = deployment["spec"]["selector"]["matchLabels"]
    assert selected == service["spec"]["selector"] == labels
    assert budget["spec"]["selector"]["matchLabels"] == labels
    assert deployment["spec"]["replicas"] == 2
    ports = {port["name"] for port in pod["containers"][0]["ports"]}
    assert {service["spec"]["ports"][0]["targetPort"]} <= ports


def _documents() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((QUEUE / "kubernetes.yaml").read_text()))


def _pod() -> dict[str, Any]:
    pod: dict[str, Any] = _documents()[0]["spec"]["template"]["spec"]
    return pod


def _unit() -> RawConfigParser:
    parser = RawConfigParser(strict=False)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read(QUEUE / "manta-queue.service")
    return parser


def _with(container: dict[str, Any], changes: dict[str, str]) -> list[str]:
    """The container's words, `manta` being this environment's."""
    words = [*container["command"], *container.get("args", [])]
    assert words[0] == "manta"
    assert changes.keys() <= set(words)
    return [MANTA, *(changes.get(word, word) for word in words[1:])]


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _until_answers(url: str) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def answers() -> bool:
        try:
            return bool(opener.open(url, timeout=5).status == 200)
        except OSError:
            return False

    until(answers, f"{url} answers", timeout_s=30)
