"""A cluster with three applications, shared by the tests of this folder.

A tiny language model, from the registry, with tools, structured output and adapters that lie in
S3; the same model, from S3, as one that embeds; and the project's own embedding application.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import tiny_model
import yaml

from manta.cluster.record import ClusterRecord
from manta.serving.access import key_store, keys
from manta.serving.access.keys import Role

REPOSITORY = Path(__file__).parents[3]
MANTA = str(Path(sys.executable).with_name("manta"))
ADAPTERS = "s3://manta/adapters"
UP = ("up", "--num-cpus", "12", "--ports", "auto", "--timeout-s", "300", "--json")
"""An LLM replica asks for two logical CPUs, and there are up to four beside the embeddings."""


@dataclass(frozen=True)
class Site:
    """Where the applications answer, and keys for them."""

    url: str
    storage: str
    user: str
    admin: str
    cluster: ClusterRecord
    manta: Callable[..., str]
    """Runs `manta WORDS…` for its cluster; what that printed."""

    def key(self, *, role: Role = Role.USER, models: tuple[str, ...] = ("*",)) -> str:
        """A new key; the replicas know it within 2 s."""
        key, secret = keys.make(name="test", owner="me", now=time.time(), role=role, models=models)
        key_store.save(self.storage, key)
        return secret

    def http(self, secret: str, prefix: str = "") -> httpx.Client:
        """A plain client of one application."""
        headers = {"Authorization": f"Bearer {secret}"}
        return httpx.Client(base_url=self.url + prefix, headers=headers, timeout=60)

    def openai(self, secret: str = "", prefix: str = "") -> openai.OpenAI:
        """OpenAI's own client of one application."""
        url = f"{self.url}{prefix}/v1"
        return openai.OpenAI(base_url=url, api_key=secret or self.user, max_retries=0, timeout=60)


def language_model() -> dict[str, Any]:
    """`serve_apps/llm.yaml` with what users add for tools, structured output and adapters."""
    (app,) = yaml.safe_load((REPOSITORY / "serve_apps" / "llm.yaml").read_text())["applications"]
    (llm,) = app["args"]["llm_configs"]
    llm["model_loading_config"] = {"model_id": "tiny", "model_source": "tiny@production"}
    llm["lora_config"] = {
        "dynamic_lora_loading_path": ADAPTERS,
        "max_num_adapters_per_replica": 2,
    }
    llm["engine_kwargs"] |= {
        "max_model_len": 256,
        "enable_lora": True,
        "max_loras": 2,
        "max_cpu_loras": 2,
        "enable_auto_tool_choice": True,
        "tool_call_parser": "xlam",
        # An untrained model that may would write white space for ever.
        "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
    }
    return dict(app)


def embedding_model() -> dict[str, Any]:
    """The same weights as a model that embeds: `runner: pooling`."""
    app = language_model()
    (llm,) = app["args"]["llm_configs"]
    llm["model_loading_config"] = {
        "model_id": "reader",
        "model_source": "s3://manta/models/tiny",
    }
    del llm["lora_config"]
    llm["engine_kwargs"] = {"max_model_len": 256, "enforce_eager": True, "runner": "pooling"}
    return {**app, "name": "reader", "route_prefix": "/reader"}


def own_embeddings() -> dict[str, Any]:
    """`serve_apps/embeddings.yaml` with less of a core."""
    file = REPOSITORY / "serve_apps" / "embeddings.yaml"
    (app,) = yaml.safe_load(file.read_text())["applications"]
    app["deployments"][0]["ray_actor_options"] = {"num_cpus": 0.1}
    return dict(app)


@pytest.fixture(scope="package")
def site(tmp_path_factory: pytest.TempPathFactory, object_store: dict[str, str]) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    storage = str(folder / "storage")
    for root in (storage, "s3://manta"):
        tiny_model.write(root, "tiny")
    apps = [language_model(), embedding_model(), own_embeddings()]
    (folder / "apps.yaml").write_text(yaml.safe_dump({"applications": apps}))
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MANTA_"))},
        **object_store,
        "MANTA_HOME": str(folder / "home"),
        "MANTA_STORAGE": storage,
    }

    def manta(*words: str) -> str:
        done = subprocess.run(
            [MANTA, *words], env=environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    manta("models", "add", "tiny", "--as", "production")
    record = json.loads(manta(*UP))
    try:
        environment |= ClusterRecord(**record).client_environment()
        manta("deploy", str(folder / "apps.yaml"))
        admin = Path(record["token_path"]).with_name("api_key").read_text().strip()
        made = Site(record["serve_url"], storage, "", admin, ClusterRecord(**record), manta)
        yield replace(made, user=made.key())
    finally:
        manta("down", "--yes")


@pytest.fixture(scope="package")
def known(site: Site) -> Site:
    """The site once its applications know the user's key."""
    for prefix in ("", "/reader", "/embeddings"):
        wait_for_key(site, site.user, prefix)
    return site


def started_at(site: Site, prefix: str) -> str:
    """When the replica's process began."""
    with site.http(site.admin, prefix) as client:
        lines = client.get("/metrics").text.splitlines()
    (told,) = [line for line in lines if line.startswith("process_start_time_seconds ")]
    return told


def wait_for_key(site: Site, secret: str, prefix: str = "") -> None:
    deadline = time.monotonic() + 5
    with site.http(secret, prefix) as client:
        while client.get("/v1/models").status_code == 401:
            assert time.monotonic() < deadline, "the key is not known"
            time.sleep(0.1)
