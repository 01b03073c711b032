"""A real Prometheus, with the files of configs/monitoring, reads what a cluster tells."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from .conftest import Site

REPOSITORY = Path(__file__).parents[3]
FOLDER = REPOSITORY / "configs" / "monitoring"
READY_S = 90
"""Guards tell every 5 s, Ray every 10 s, Prometheus reads every 10 s, and a rate needs two."""
VARIABLES = {"$__rate_interval": "1m", "$application": ".*", "$key": ".*", "$model": ".*"}
LONG = [7] * 150
"""Token ids: more than a block of the engine's cache, 128 on a CPU, so that it is found again."""
NOTHING_TO_SHOW = {
    "Jobs by state": "no queue's controller listens",
    "A controller is at work": "as above",
    "Over limits or budget, by key": "nobody was over",
    "Share that fails or finds no room": "nothing failed",
    "Preemptions": "none",
    "GPU and CPU": "the node has no GPU, and one of its two series is enough",
}
"""Panels that may be empty here, and why."""

pytestmark = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="no prometheus (Debian's package of that name)"
)


@dataclass(frozen=True)
class Prometheus:
    """One that runs, and what it is asked."""

    url: str

    def ask(self, expression: str) -> list[dict[str, Any]]:
        """The series that the expression has now. Raises where Prometheus refuses it."""
        answer = httpx.get(f"{self.url}/api/v1/query", params={"query": expression}, timeout=10)
        assert answer.status_code == 200, answer.text
        return list(answer.json()["data"]["result"])

    def up(self) -> bool:
        try:
            return httpx.get(f"{self.url}/-/ready", timeout=1).status_code == 200
        except httpx.HTTPError:
            return False


@pytest.fixture(scope="module")
def prometheus(known: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """The shipped files as they are, but for the dashboard's address; users ask all the while."""
    folder = tmp_path_factory.mktemp("prometheus")
    shutil.copy(FOLDER / "alerts.yml", folder)
    config = (FOLDER / "prometheus.yml").read_text()
    (folder / "prometheus.yml").write_text(
        config.replace("http://127.0.0.1:8265", known.cluster.dashboard_url)
    )
    shutil.copy(known.cluster.token_path, folder / "cluster_token")
    (folder / "queue_key").write_text("none")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = [
        "prometheus",
        f"--config.file={folder}/prometheus.yml",
        f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log)
    made = Prometheus(f"http://127.0.0.1:{port}")
    try:
        until(made.up, "Prometheus is up")
        until(lambda: ask_and_look(known, made), "it shows tokens of the last minute")
        yield made
    finally:
        process.terminate()
        process.wait(timeout=20)


def ask_and_look(site: Site, prometheus: Prometheus) -> bool:
    with site.openai() as client:
        for _ in client.completions.create(model="tiny", prompt=LONG, max_tokens=8, stream=True):
            pass
    time.sleep(2)
    return bool(prometheus.ask("sum(rate(ray_manta_tokens_total[1m])) > 0"))


def until(holds: Any, what: str) -> None:
    deadline = time.monotonic() + READY_S
    while not holds():
        assert time.monotonic() < deadline, f"not within {READY_S} s: {what}"
        time.sleep(0.5)


def test_it_finds_the_nodes_and_each_lets_it_read(prometheus: Prometheus) -> None:
    nodes = prometheus.ask('up{job="ray"}')
    assert nodes
    assert {series["value"][1] for series in nodes} == {"1"}


def test_every_panel_of_the_dashboard_has_something_to_draw(prometheus: Prometheus) -> None:
    panels = json.loads((FOLDER / "dashboard.json").read_text())["panels"]
    empty = set()
    for panel in panels:
        for target in panel.get("targets", []):
            expression = target["expr"]
            for name, value in VARIABLES.items():
                expression = expression.replace(name, value)
            if not prometheus.ask(expression):
                empty.add(panel["title"])
    assert empty - set(NOTHING_TO_SHOW) == set()


def test_its_alerts_are_those_that_hold(prometheus: Prometheus) -> None:
    """No queue here, so that one is on its way; what is well is quiet."""

    def pending() -> set[str]:
        return {series["metric"]["alertname"] for series in prometheus.ask("ALERTS")}

    until(lambda: "QueueControllerAway" in pending(), "the queue's alert is on its way")
    assert pending() == {"QueueControllerAway"}


def test_no_key_is_in_what_it_keeps(known: Site, prometheus: Prometheus) -> None:
    names = httpx.get(f"{prometheus.url}/api/v1/label/__name__/values", timeout=10).json()["data"]
    kept = httpx.get(
        f"{prometheus.url}/api/v1/series", params={"match[]": '{__name__=~"ray_manta.*"}'}
    ).text
    assert any(re.match("ray_vllm_", name) for name in names)
    assert "ray_manta_requests_total" in kept
    assert known.user not in kept
    assert known.admin not in kept
