"""Where serving is broken: a guarded application under load, and the processes behind it."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml
from echo_app import answer_to
from load import Ask, Failed, Wrong
from terminal import MANTA, Terminal, until

from manta.cluster import dashboard, processes
from manta.cluster.record import ClusterRecord

NAME = "echo"
REPOSITORY = Path(__file__).parents[2]
_numbers = itertools.count()


@dataclass(frozen=True)
class ServingArena:
    """The cluster of a terminal, with the application deployed."""

    terminal: Terminal

    @property
    def record(self) -> ClusterRecord:
        known = self.terminal.home / "clusters" / "local" / "cluster.json"
        return ClusterRecord(**json.loads(known.read_text()))

    @property
    def headers(self) -> dict[str, str]:
        key = self.terminal.home / "clusters" / "local" / "api_key"
        return {"Authorization": f"Bearer {key.read_text().strip()}"}

    def deploy(self, app: dict[str, Any]) -> None:
        self.terminal(MANTA, "deploy", self._write(app))

    def _write(self, app: dict[str, Any]) -> str:
        path = self.terminal.folder / f"{app['name']}.yaml"
        path.write_text(yaml.safe_dump({"applications": [app]}))
        return str(path)

    def deploy_echo(self, num_replicas: int = 2) -> None:
        deployment = {
            "name": "Echo",
            "num_replicas": num_replicas,
            "max_ongoing_requests": 100,
            "health_check_period_s": 1,
            "ray_actor_options": {"num_cpus": 0.1},
        }
        self.deploy(
            {
                "name": NAME,
                "route_prefix": f"/{NAME}",
                "import_path": "echo_app:app",
                "args": {"guard": {"keys": "required"}},
                "runtime_env": {"env_vars": {"PYTHONPATH": str(Path(__file__).parent)}},
                "deployments": [deployment],
            }
        )

    def llm_file(self, model: str, num_replicas: int = 2, **guard: Any) -> str:
        """The shipped LLM application, with a small model at a route of its own."""
        config = yaml.safe_load((REPOSITORY / "serve_apps" / "llm.yaml").read_text())
        (app,) = config["applications"]
        (llm,) = app["args"]["llm_configs"]
        llm["model_loading_config"] = {"model_id": model, "model_source": model}
        llm["engine_kwargs"]["max_model_len"] = 256
        deployment = llm["deployment_config"]
        del deployment["autoscaling_config"]
        deployment |= {"num_replicas": num_replicas, "health_check_period_s": 2}
        app["args"]["guard"] |= guard
        return self._write(app | {"name": model, "route_prefix": f"/{model}"})

    @property
    def url(self) -> str:
        return f"{self.record.serve_url}/{NAME}"

    def replicas(self, app: str = NAME, kind: str = "") -> list[int]:
        """Process ids of an application's replicas that run; of deployments named like `kind`."""
        found = dashboard.get(self.record, "/api/serve/applications/")["applications"].get(app)
        deployments = found["deployments"].values() if found else ()
        return [
            replica["pid"]
            for deployment in deployments
            for replica in deployment["replicas"]
            if deployment["name"].startswith(kind)
            and replica["state"] == "RUNNING"
            and psutil.pid_exists(replica["pid"])
        ]

    def named(self, *marks: str) -> list[int]:
        """Process ids of the cluster's processes whose title has one of these words."""
        found = []
        for process in processes.members(self.record.cluster_id):
            with contextlib.suppress(psutil.Error):
                title = " ".join(process.cmdline()[:1])
                if any(mark in title for mark in marks):
                    found.append(process.pid)
        return found


def whole(url: str, model: str = NAME) -> Ask:
    """A question that is answered at once; its answer is checked."""

    async def ask(client: httpx.AsyncClient) -> str:
        prompt = f"question {next(_numbers)}"
        body = {"model": model, "prompt": prompt}
        answer = await client.post(f"{url}/v1/completions", json=body)
        if answer.status_code != 200:
            raise Failed(f"{answer.status_code} {answer.text[:60]}")
        if (text := answer.json()["choices"][0]["text"]) != answer_to(prompt):
            raise Wrong(f"{prompt}: {text}")
        return "whole"

    return ask


def streamed(url: str, model: str = NAME) -> Ask:
    """A question whose answer is streamed; one that ends well must be all of it."""

    async def ask(client: httpx.AsyncClient) -> str:
        prompt = f"question {next(_numbers)}"
        body = {"model": model, "prompt": prompt, "stream": True}
        said = await events(client, url, body)
        if "".join(said[:-1]) != answer_to(prompt) or said[-1] != "[DONE]":
            raise Wrong(f"{prompt}: {said}")
        return "streamed"

    return ask


def generated(url: str, model: str, *, stream: bool) -> Ask:
    """A question to a language model: its answer repeats it, and has as many tokens as asked."""

    async def ask(client: httpx.AsyncClient) -> str:
        prompt, most = f"def question_{next(_numbers)}():", 8
        body = {"model": model, "prompt": prompt, "max_tokens": most, "ignore_eos": True}
        if stream:
            options = {"stream": True, "stream_options": {"include_usage": True}}
            said = await events(client, url, body | options)
            # Not by the number of events: an engine that is busy puts several tokens into one.
            if said[-2:] != [f"{most} tokens", "[DONE]"]:
                raise Wrong(f"{prompt}: {said}")
            return "streamed"
        answer = await client.post(f"{url}/v1/completions", json=body | {"echo": True})
        if answer.status_code != 200:
            raise Failed(f"{answer.status_code} {answer.text[:60]}")
        value = answer.json()
        text, used = value["choices"][0]["text"], value["usage"]["completion_tokens"]
        if not text.startswith(prompt) or used != most:
            raise Wrong(f"{prompt}: {text}")
        return "whole"

    return ask


async def events(client: httpx.AsyncClient, url: str, body: dict[str, Any]) -> list[str]:
    """The texts of a stream, the tokens that it says it used, and its end."""
    said = []
    async with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            raise Failed(f"{answer.status_code} {(await answer.aread())[:60]!r}")
        async for line in answer.aiter_lines():
            if line.startswith('data: {"error'):
                raise Failed(f"error in the stream: {line[6:66]}")
            if line.startswith("data: {"):
                value = json.loads(line[6:])
                said += [choice["text"] for choice in value["choices"]]
                if used := value.get("usage"):
                    said.append(f"{used['completion_tokens']} tokens")
            elif line.startswith("data: "):
                said.append(line[6:])
    return said or [""]


def kill_every(period_s: float, times: int, find: Callable[[], list[int]], least: int = 1) -> int:
    """SIGKILL one of those found, again and again; how often one was killed.

    Waits until at least `least` are there, so that what restarts slower is killed more seldom.
    """
    for _ in range(times):
        began = time.monotonic()
        found = until(lambda: len(pids := find()) >= least and pids, f"{least} to kill", 120)
        with contextlib.suppress(ProcessLookupError):
            os.kill(random.choice(found), signal.SIGKILL)
        time.sleep(max(0.0, period_s - (time.monotonic() - began)))
    return times
