"""Batch inference and serving on a real cluster with the real vLLM, driven as a user does."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import ssl
import stat
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import openai
import psutil
import pyarrow.parquet as pq
import pytest
import talkers
import tiny_model
import yaml
from prometheus_client.parser import text_string_to_metric_families

from manta.cluster import ports, processes, tls
from manta.cluster.record import ClusterRecord

# vLLM starts in half a minute on an idle machine, and in minutes on a busy one.
pytestmark = pytest.mark.timeout(900)

REPOSITORY = Path(__file__).parents[2]
PYTHON = sys.executable
MANTA = str(Path(sys.executable).with_name("manta"))
SERVE = str(Path(sys.executable).with_name("serve"))
NUM_ROWS, ROWS_PER_SHARD = 40, 8
CANARY = "canary-7c1f in a prompt"


@dataclass(frozen=True)
class Lab:
    """A cluster with one small model in its storage, and a folder to write files into."""

    folder: Path
    storage: Path
    environment: dict[str, str]
    record: dict[str, str]

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            words,
            cwd=REPOSITORY,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def __call__(self, *words: str, ok: int = 0, timeout_s: float = 600) -> str:
        process = self.start(*words)
        try:
            output, _ = process.communicate(timeout=timeout_s)
        finally:
            process.kill()
        assert process.returncode == ok, output
        return output

    def write(self, name: str, value: object) -> str:
        file = self.folder / name
        file.write_text(value if isinstance(value, str) else yaml.safe_dump(value))
        return str(file)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("lab")
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MANTA_"))},
        "MANTA_HOME": str(folder / "home"),
        "MANTA_STORAGE": str(folder / "storage"),
        "PYTHONPATH": str(folder),  # the cluster's workers find the test's own applications here
    }
    (folder / "hello.py").write_text(HELLO)
    (folder / "words.py").write_text(WORDS)
    (folder / "batches.py").write_text(BATCHES)
    (folder / "talkers_app.py").write_text(talkers.SOURCE)
    tiny_model.write(str(folder / "storage"), "tiny")
    tls.new_keys(folder)
    environment["TEST_TLS_PORT"] = str(ports.free(1)[0])
    own = folder / "tls-here"
    with_tls = ["--serve-tls", str(own / "node.crt"), str(own / "node.key")]
    with_tls += ["--serve-tls-address", f"127.0.0.1:{environment['TEST_TLS_PORT']}"]
    up = subprocess.run(
        [MANTA, "up", "--ports", "auto", "--timeout-s", "300", "--json", *with_tls],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert up.returncode == 0, up.stderr
    try:
        record = json.loads(up.stdout)
        client = ClusterRecord(**record).client_environment()
        client["MANTA_SERVE_URL"] = record["serve_url"]
        yield Lab(folder, folder / "storage", environment | client, record)
    finally:
        subprocess.run([MANTA, "down", "--yes"], env=environment, check=False, timeout=120)


HELLO = """
from ray import serve

@serve.deployment(ray_actor_options={"num_cpus": 0.1})
class Hello:
    def __init__(self, text):
        if text == "broken":
            raise RuntimeError("no such text: " + text)
        self.text = text

    async def __call__(self, request):
        return self.text

def app(args):
    return Hello.bind(args["text"])
"""


WORDS = """
import time
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from ray import serve
from manta import storage
from manta.serving.guard.ingress import guarded_class
from manta.spec.guard import GuardConfig

api = FastAPI()

class Words:
    @api.post("/v1/completions")
    def answer(self):
        time.sleep(0.05)  # long enough for several to be busy at a time
        lines = [b'data: {"choices": [{"text": "a"}]}\\n\\n', b'data: {"choices": [], "usage": '
                 b'{"prompt_tokens": 3, "completion_tokens": 1}}\\n\\n']
        return StreamingResponse(iter(lines), media_type="text/event-stream")

def app(args):
    ingress = serve.ingress(api)(guarded_class(Words, GuardConfig(), storage.root()))
    options = {"num_cpus": 0.1}
    return serve.deployment(ingress, num_replicas=3, ray_actor_options=options).bind()
"""


BATCHES = """
from ray import serve
from manta.serving.embeddings import Embedder
from manta.spec.apps import EmbedderConfig

class Batches(Embedder):
    sizes = []

    def _encode(self, texts):
        self.sizes.append(len(texts))
        return super()._encode(texts)

    async def __call__(self, request):
        if request.method == "GET":
            return self.sizes
        vectors = await self.embed([request.query_params["text"]])
        return [float(number) for number in vectors[0]]

def app(args):
    config = EmbedderConfig(max_batch_size=16, batch_wait_s=0.5)
    options = {"max_ongoing_requests": 64, "ray_actor_options": {"num_cpus": 0.1}}
    return serve.deployment(Batches, **options).bind(config)
"""


def wait_for(what: str, ready: Callable[[], bool], timeout_s: float, log: Path) -> None:
    deadline = time.monotonic() + timeout_s
    while not ready():
        late = time.monotonic() > deadline
        assert not late, f"no {what} within {timeout_s} s:\n{log.read_text()}"
        time.sleep(0.1)


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return str(answer.read().decode())


# --- batch inference -------------------------------------------------------------------------


def generate_config(lab: Lab, **changes: object) -> str:
    config = {
        "name": "batch",
        "model": "tiny",
        "prompts": str(lab.folder / "prompts.jsonl"),
        "rows_per_shard": ROWS_PER_SHARD,
        "batch_size": ROWS_PER_SHARD,
        # One row at a time through the engine, so that shards finish one after the other.
        "engine_kwargs_passthrough": {
            "max_model_len": 256,
            "max_num_seqs": 1,
            "enforce_eager": True,
        },
        "sampling": {"max_tokens": 100, "temperature": 0.0},
    }
    return lab.write("generate.yaml", {**config, **changes})


def test_a_killed_generation_goes_on_without_redoing_finished_shards(lab: Lab) -> None:
    rows = [{"id": i, "prompt": f"def f{i}("} for i in range(NUM_ROWS)]
    (lab.folder / "prompts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    command = (PYTHON, "jobs/generate.py", "--config", generate_config(lab))

    def shards() -> list[Path]:
        return sorted(lab.storage.glob("generations/batch/*/shard-*.parquet"))

    log = lab.folder / "first.log"
    with log.open("w") as out:
        first = subprocess.Popen(
            command, cwd=REPOSITORY, env=lab.environment, stdout=out, stderr=out
        )
    try:
        wait_for("finished shard", lambda: bool(shards()) or first.poll() is not None, 400, log)
    finally:
        first.kill()  # SIGKILL: no chance to tidy up
        first.wait()
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in shards()}
    assert 0 < len(before) < NUM_ROWS // ROWS_PER_SHARD, log.read_text()

    again = lab(*command)
    assert f"{len(before)} of them finished before" in again
    assert {f: (f.stat().st_mtime_ns, f.read_bytes()) for f in before} == before
    found = [row for file in shards() for row in pq.read_table(file).to_pylist()]
    assert [{"id": row["id"], "prompt": row["prompt"]} for row in found] == rows
    assert all(0 < row["num_generated_tokens"] <= 100 and row["completion"] for row in found)
    assert "5 shards, 5 of them finished before" in lab(*command)


@pytest.mark.parametrize(
    ("content", "changes", "message"),
    [
        (None, {}, "no such file"),
        ("", {}, "holds no prompts"),
        ('{"prompt": "a"}\n{"prompt"\n', {}, "prompts.jsonl:2: not JSON"),
        ('{"prompt": "a"}\n[1]\n', {}, "prompts.jsonl:2: not a JSON object"),
        ('{"text": "a"}\n', {}, "prompts.jsonl:1: no field `prompt`; set prompt_field to one of"),
        ('{"prompt": ""}\n', {}, "prompts.jsonl:1: `prompt` is empty"),
        ('{"prompt": "a"}\n', {"model": "untrained"}, "model `untrained` does not exist"),
    ],
)
def test_bad_prompts_get_one_line_and_exit_2(
    lab: Lab, content: str | None, changes: dict[str, object], message: str
) -> None:
    file = lab.folder / "bad" / "prompts.jsonl"
    file.parent.mkdir(exist_ok=True)
    file.unlink(missing_ok=True)
    if content is not None:
        file.write_text(content)
    config = generate_config(lab, name="bad", prompts=str(file), **changes)
    output = lab(PYTHON, "jobs/generate.py", "--config", config, ok=2)
    assert message in output
    assert len(output.splitlines()) == 1


# --- serving ---------------------------------------------------------------------------------


def hello(name: str, text: str) -> dict[str, object]:
    return {
        "name": name,
        "route_prefix": f"/{name}",
        "import_path": "hello:app",
        "args": {"text": text},
    }


def deploy(lab: Lab, name: str, *apps: dict[str, object], ok: int = 0) -> str:
    return lab(MANTA, "deploy", lab.write(f"{name}.yaml", {"applications": list(apps)}), ok=ok)


def apps(lab: Lab) -> dict[str, str]:
    listed = json.loads(lab(MANTA, "apps", "--json"))
    return {app["name"]: app["status"] for app in listed}


def test_a_second_app_keeps_the_first_and_undeploy_removes_only_its_own(lab: Lab) -> None:
    deploy(lab, "one", hello("one", "first"))
    deploy(lab, "two", hello("two", "second"))
    url = lab.record["serve_url"]
    assert (get(f"{url}/one"), get(f"{url}/two")) == ("first", "second")
    status = yaml.safe_load(lab(SERVE, "status"))
    assert {name: app["status"] for name, app in status["applications"].items()} == apps(lab)
    lab(MANTA, "undeploy", "two")
    assert apps(lab) == {"one": "RUNNING"}
    assert get(f"{url}/one") == "first"


def test_a_broken_app_fails_with_its_own_error_while_the_others_answer(lab: Lab) -> None:
    deploy(lab, "one", hello("one", "first"))
    output = deploy(lab, "broken", hello("broken", "broken"), ok=1)
    assert "no such text: broken" in output
    assert "`broken` did not run before and was removed" in output
    assert get(f"{lab.record['serve_url']}/one") == "first"
    assert apps(lab) == {"one": "RUNNING"}


def test_an_app_that_cannot_be_imported_fails_with_its_own_error(lab: Lab) -> None:
    output = deploy(lab, "gone", {**hello("gone", "x"), "import_path": "no_such_module:app"}, ok=1)
    assert "No module named 'no_such_module'" in output
    assert "gone" not in apps(lab)


def test_a_dry_run_prints_the_plain_command_and_changes_nothing(lab: Lab) -> None:
    before = apps(lab)
    file = lab.write("three.yaml", {"applications": [hello("three", "third")]})
    output = lab(MANTA, "deploy", file, "--dry-run")
    assert f"serve deploy {file}" in output
    assert "added     three" in output
    assert apps(lab) == before


def test_the_limit_of_a_streaming_client_holds_over_three_replicas(lab: Lab) -> None:
    options = ("--requests-per-min", "40", "--json")
    key = json.loads(lab(MANTA, "keys", "make", "many", *options))["secret"]
    app = {"name": "words", "route_prefix": "/words", "import_path": "words:app"}
    deploy(lab, "words", app)
    url = f"{lab.record['serve_url']}/words/v1/completions"
    with httpx.Client(headers={"Authorization": f"Bearer {key}"}, timeout=60) as client:

        def ask(_: object) -> httpx.Response:
            return client.post(url, json={"prompt": "a", "stream": True})

        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(ask, range(120)))
    codes = [answer.status_code for answer in answers]
    assert (codes.count(200), codes.count(429)) == (40, 80)
    assert '"usage"' not in "".join(answer.text for answer in answers)

    def used() -> tuple[int, int]:
        rows = json.loads(lab(MANTA, "keys", "usage", "--json"))
        own = [row for row in rows if row["name"] == "many"]
        return sum(r["prompt_tokens"] for r in own), sum(r["completion_tokens"] for r in own)

    poll("use of all replicas", lambda: used() == (3 * 40, 40), timeout_s=20)
    written = list(lab.storage.glob("usage/*/*.json"))
    assert len(written) > 1, "one replica answered everything: nothing was shown"
    prometheus_finds_what_the_guards_counted(lab)
    lab(MANTA, "undeploy", "words")


def prometheus_finds_what_the_guards_counted(lab: Lab) -> None:
    """Over all replicas, at the addresses that the dashboard tells Prometheus."""
    mine = {"application": "words", "key": "many"}

    def told(name: str, **labels: str) -> float:
        return sum(
            one.value
            for family in text_string_to_metric_families(metrics_page(lab))
            for one in family.samples
            if one.name == name and (mine | labels).items() <= one.labels.items()
        )

    requests = "ray_manta_requests_total"
    poll("metrics", lambda: told(requests) >= 120, timeout_s=60)
    assert told(requests, outcome="ok", status="200") == 40
    assert told(requests, outcome="limit", status="429") == 80
    assert told("ray_manta_tokens_total", kind="prompt") == 3 * 40
    first = "ray_manta_time_to_first_token_seconds"
    assert told(f"{first}_count_total") == 40
    assert told(f"{first}_bucket_total", le="+Inf") == 40
    assert told(f"{first}_bucket_total", le="0.025") < 1, "the application waits 50 ms"
    assert 40 * 0.05 <= told(f"{first}_sum_total") < 40 * 10
    page = metrics_page(lab)
    for name in (
        "ray_manta_requests_in_flight_max",
        "ray_serve_deployment_replica_healthy",
        "ray_serve_deployment_status",
        "ray_serve_application_status",
        "ray_node_cpu_utilization",
        "ray_node_disk_utilization_percentage",
    ):
        assert f"\n{name}{{" in page, f"{name}: an alert or the dashboard asks for it"
    (words,) = (
        app
        for app in json.loads(lab(MANTA, "apps", "--watch", "--json"))
        if app["name"] == "words"
    )
    assert words["num_replicas"] == 3
    assert words["live"]["requests_per_s"] == 0  # nobody asks any more
    assert words["live"]["in_flight"] == 0


def metrics_page(lab: Lab) -> str:
    token = Path(lab.record["token_path"]).read_text().strip()
    url = f"{lab.record['dashboard_url']}/api/prometheus/sd"
    found = httpx.get(url, headers={"Authorization": f"Bearer {token}"}).json()
    targets = [target for group in found for target in group["targets"]]
    return "\n".join(get(f"http://{target}/metrics") for target in targets)


def test_the_projects_serve_config_answers_a_streaming_client(lab: Lab) -> None:
    deploy(lab, "one", hello("one", "first"))
    config = yaml.safe_load((REPOSITORY / "serve_apps" / "llm.yaml").read_text())
    llm = config["applications"][0]["args"]["llm_configs"][0]
    llm["model_loading_config"] = {"model_id": "served", "model_source": "tiny"}
    llm["engine_kwargs"]["max_model_len"] = 256
    llm["engine_kwargs"]["max_num_seqs"] = 8
    guarded = config["applications"][0]["args"]["guard"]
    guarded["cache"] = {"ttl_s": 600}
    del guarded["max_requests_in_flight"]  # it follows from the engine
    output = lab(MANTA, "deploy", lab.write("llm.yaml", config))
    assert "says port 8000; using" in output  # the cluster's own port wins over the file's
    assert apps(lab) == {"one": "RUNNING", "llm": "RUNNING"}

    question = {"model": "served", "prompts": ["def "], "max_tokens": 12}
    answer = lab(PYTHON, "jobs/ask.py", "--config", lab.write("ask.yaml", question))
    assert " tokens, first after" in answer
    unknown = {**question, "model": "other"}
    refusal = lab(PYTHON, "jobs/ask.py", "--config", lab.write("ask.yaml", unknown), ok=2)
    assert "model `other` is not served" in refusal
    assert "set model to one of: served" in refusal
    stranger = lab.environment | {"OPENAI_API_KEY": "manta_nobody"}
    asked = ("jobs/ask.py", "--config", lab.write("ask.yaml", question))
    refusal = replace(lab, environment=stranger)(PYTHON, *asked, ok=2)
    assert "does not take the API key" in refusal

    answers_come_from_documents(lab)
    guard = Guarded(lab)
    guard.no_route_opens_without_a_key()
    guard.use_is_counted_and_limits_hold()
    guard.a_client_that_goes_away_frees_its_slot()
    guard.haproxy_refuses_what_the_engine_has_no_room_for()
    guard.a_revoked_key_is_refused_within_two_seconds()
    guard.the_same_question_is_answered_from_the_cache_also_over_tls()
    guard.no_key_is_in_a_log_or_a_process_list()
    guard.no_prompt_or_answer_is_in_a_log_or_in_storage()
    guard.a_replica_whose_engine_died_ends_and_is_replaced()

    lab(MANTA, "undeploy", "llm")
    assert get(f"{lab.record['serve_url']}/one") == "first"


def shipped(lab: Lab, name: str, **changes: object) -> str:
    """Deploy a file of `serve_apps` with other arguments; returns where it answers."""
    config = yaml.safe_load((REPOSITORY / "serve_apps" / f"{name}.yaml").read_text())
    (app,) = config["applications"]
    app["args"] |= changes
    for deployment in app["deployments"]:  # two cores, and the model holds one of them
        deployment["ray_actor_options"] = {"num_cpus": 0.1}
    lab(MANTA, "deploy", lab.write(f"{name}.yaml", config))
    return f"{lab.record['serve_url']}{app['route_prefix']}/v1"


def answers_come_from_documents(lab: Lab) -> None:
    """The composed application asks the real model, with what it found, and is guarded itself."""
    documents = lab.folder / "documents"
    documents.mkdir()
    (documents / "keys.md").write_text("A key is revoked with `manta keys revoke`.")
    (documents / "prices.md").write_text("Prices are list prices of three clouds.")
    generator = {"url": f"{lab.record['serve_url']}/v1", "model": "served"}
    url = shipped(lab, "rag", documents=str(documents), num_passages=1, generator=generator)
    client = openai.OpenAI(base_url=url, api_key=owners_key(lab), max_retries=0)
    chat = client.chat.completions.with_raw_response.create(
        model="rag",
        messages=[{"role": "user", "content": "How is a key revoked?"}],
        max_tokens=8,
    )
    assert chat.headers["x-sources"] == '["keys.md#1"]'
    usage = chat.parse().usage
    assert usage is not None
    assert usage.completion_tokens == 8
    assert usage.prompt_tokens > 60, "the passage is not in the prompt"  # one token a byte
    stream = client.completions.create(
        model="rag", prompt="What are the prices?", max_tokens=12, stream=True
    )
    assert sum(bool(chunk.choices and chunk.choices[0].text) for chunk in stream) > 1
    with pytest.raises(openai.BadRequestError, match="the model here is `rag`"):
        client.completions.create(model="served", prompt="a")
    stranger = openai.OpenAI(base_url=url, api_key="manta_nobody", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        stranger.models.list()
    lab(MANTA, "undeploy", "rag")


def owners_key(lab: Lab) -> str:
    return Path(lab.record["token_path"]).with_name("api_key").read_text().strip()


def test_the_embedding_app_batches_is_guarded_and_answers_openais_client(lab: Lab) -> None:
    url = shipped(lab, "embeddings", num_dimensions=64)
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=url, api_key="manta_nobody", max_retries=0).models.list()
    made = json.loads(lab(MANTA, "keys", "make", "embedder", "--json"))["secret"]
    client = openai.OpenAI(base_url=url, api_key=made, max_retries=0)
    until_known(client)
    texts = ["How do I revoke an API key?", "Revoking an API key takes two seconds.", "Tea."]
    question, near, far = (
        entry.embedding for entry in client.embeddings.create(model="ngrams", input=texts).data
    )
    assert len(question) == 64
    assert dot(question, near) > dot(question, far) + 0.2
    plain = client.embeddings.create(model="ngrams", input=texts[0], encoding_format="float")
    assert plain.data[0].embedding == pytest.approx(question, abs=1e-6)
    with pytest.raises(openai.BadRequestError, match="the model here is `ngrams`"):
        client.embeddings.create(model="other", input="a")
    poll("use written", lambda: Guarded(lab).usage("embedder")[0] >= 2, timeout_s=20)
    lab(MANTA, "undeploy", "embeddings")


def test_requests_that_come_together_share_a_pass_and_each_gets_its_own(lab: Lab) -> None:
    app = {"name": "batches", "route_prefix": "/batches", "import_path": "batches:app"}
    deploy(lab, "batches", app)
    url = f"{lab.record['serve_url']}/batches"
    with httpx.Client(timeout=60) as client, ThreadPoolExecutor(32) as pool:

        def ask(text: str) -> list[float]:
            return list(client.post(url, params={"text": text}).json())

        texts = [f"text number {i}" for i in range(32)]
        together = list(pool.map(ask, texts))
        sizes = client.get(url).json()
        assert sum(sizes) == 32
        assert max(sizes) == 16, "no batch was full"
        assert len(sizes) <= 6
        assert ask(texts[7]) == pytest.approx(together[7], abs=1e-5)
    assert len({tuple(vector) for vector in together}) == 32
    lab(MANTA, "undeploy", "batches")


def test_behind_a_gateway_a_replica_can_die_and_an_application_go_and_no_request_fails(
    lab: Lab,
) -> None:
    deploy(lab, "talkers", talkers.app("ann"), talkers.app("bob"))
    models = {
        "talk": {"to": [{"app": "ann"}, {"app": "bob", "model": "bobs"}]},
        "far": {"to": [{"url": "http://127.0.0.1:1/v1"}], "fallback": [{"app": "bob"}]},
    }
    breaker = {"failures": 3, "pause_s": 1}
    url = shipped(lab, "gateway", models=models, breaker=breaker).removesuffix("/v1")
    key = json.loads(lab(MANTA, "keys", "make", "gate", "--model", "talk", "--json"))["secret"]
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
    until_known(client)
    assert [model.id for model in client.models.list()] == ["talk"]

    with talkers.Load(url, key, "talk", streams=False) as load:
        poll("both asked", lambda: len(load.served_by) == 2, timeout_s=20)
        killed = killed_in_the_middle(url, owners_key(lab))
        poll("the killed one back", lambda: load.pids["bob"] != killed, timeout_s=60)
    assert load.failures == []

    with talkers.Load(url, key, "talk", streams=True) as load:
        poll("both asked", lambda: len(load.served_by) == 2, timeout_s=20)
        lab(MANTA, "undeploy", "ann")
        before = load.served_by["bob"]
        poll("answers of the other", lambda: load.served_by["bob"] > before + 20, timeout_s=20)
    assert load.failures == []

    metric = 'ray_manta_gateway_requests_total{.*outcome="cut"'
    poll("metrics", lambda: bool(re.search(metric, metrics_page(lab))), timeout_s=30)
    lab(MANTA, "undeploy", "gateway")
    lab(MANTA, "undeploy", "bob")


def killed_in_the_middle(url: str, key: str) -> int:
    """Kill the replica that is answering: that client is told, and sees no whole answer.

    Returns the killed one's process id.
    """
    body = {"model": "far", "prompt": "x", "stream": True, "max_tokens": 10_000}
    headers = {"authorization": f"Bearer {key}"}
    text, pid = "", 0
    with httpx.Client(timeout=30, headers=headers) as client:
        try:
            with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
                assert answer.headers["x-manta-served-by"] == "bob"
                pid = int(answer.headers["x-pid"])
                for part in answer.iter_text():
                    if not text:
                        os.kill(pid, signal.SIGKILL)
                    text += part
        except httpx.RemoteProtocolError:
            assert '"cut_short"' in text
            assert "[DONE]" not in text
            return pid
    raise AssertionError(f"it looks whole: {text[-300:]}")


def dot(left: list[float], right: list[float]) -> float:
    return sum(a * b for a, b in zip(left, right, strict=True))


class Guarded:
    """The served application, as holders of keys and others see it."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.url = lab.record["serve_url"]
        owned = Path(lab.record["token_path"]).with_name("api_key")
        assert stat.S_IMODE(owned.stat().st_mode) == 0o600
        self.owners_key = owned.read_text().strip()

    def key(self, name: str, *options: str) -> str:
        return json.loads(self.lab(MANTA, "keys", "make", name, *options, "--json"))["secret"]

    def client(self, key: str) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)

    def usage(self, name: str) -> tuple[int, int]:
        """Requests and completion tokens of a key."""
        rows = json.loads(self.lab(MANTA, "keys", "usage", "--json"))
        own = [row for row in rows if row["name"] == name]
        return sum(r["num_requests"] for r in own), sum(r["completion_tokens"] for r in own)

    def no_route_opens_without_a_key(self) -> None:
        headers = {"Authorization": f"Bearer {self.owners_key}"}
        told = httpx.get(f"{self.url}/openapi.json", headers=headers)
        routes = [(m, path) for path, ms in told.json()["paths"].items() for m in ms]
        assert ("post", "/v1/chat/completions") in routes
        for method, path in [*routes, ("get", "/docs"), ("get", "/metrics"), ("get", "/x")]:
            for key in ({}, {"Authorization": "Bearer manta_0"}):
                answer = httpx.request(method, self.url + path, headers=key)
                assert answer.status_code == 401, (method, path)
                assert answer.json()["error"]["code"] == "invalid_api_key"

    def use_is_counted_and_limits_hold(self) -> None:
        client = self.client(self.key("counted", "--requests-per-min", "2"))
        until_known(client)
        assert num_chunks(client) > 1
        with pytest.raises(openai.RateLimitError) as caught:
            num_chunks(client)
        assert 0 < int(caught.value.response.headers["retry-after"]) <= 61
        assert caught.value.code == "rate_limit_exceeded"
        poll("use written", lambda: self.usage("counted") == (1, 12), timeout_s=20)

    def a_client_that_goes_away_frees_its_slot(self) -> None:
        client = self.client(self.key("leaver", "--concurrent-requests", "1"))
        until_known(client)
        stream = client.completions.create(
            model="served",
            prompt="import ",
            max_tokens=240,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        next(iter(stream))
        stream.close()
        poll("free slot", lambda: not raises(openai.RateLimitError, client.models.list), 2)
        poll("use written", lambda: 0 < self.usage("leaver")[1] < 240, timeout_s=20)

    def haproxy_refuses_what_the_engine_has_no_room_for(self) -> None:
        (path,) = Path(self.lab.record["temp_dir"]).glob("h/*/s")
        with socket.socket(socket.AF_UNIX) as admin:
            admin.connect(str(path))
            admin.sendall(b"show table http-llm\n")
            told = admin.recv(65536).decode()
        assert "gpt0=16 " in told, told  # eight run, and as many wait
        body = {"model": "served", "prompt": "x", "max_tokens": 200, "ignore_eos": True}
        headers = {"Authorization": f"Bearer {self.owners_key}"}

        def ask(_: int) -> int:
            return httpx.post(
                f"{self.url}/v1/completions", json=body, headers=headers, timeout=60
            ).status_code

        with ThreadPoolExecutor(40) as crowd:
            statuses = Counter(crowd.map(ask, range(40)))
        assert statuses.keys() == {200, 503}
        assert statuses[200] >= 16

    def a_revoked_key_is_refused_within_two_seconds(self) -> None:
        client = self.client(self.key("revoked", "--model", "served"))
        until_known(client)
        self.lab(MANTA, "keys", "revoke", "revoked")
        poll("refusal", lambda: raises(openai.AuthenticationError, client.models.list), 2)

    def the_same_question_is_answered_from_the_cache_also_over_tls(self) -> None:
        trusted = ssl.create_default_context(cafile=str(self.lab.folder / "tls-here" / "ca.crt"))
        address = f"https://127.0.0.1:{self.lab.environment['TEST_TLS_PORT']}"
        headers = {"Authorization": f"Bearer {self.owners_key}"}
        with httpx.Client(verify=trusted, headers=headers, timeout=60) as client:
            assert "Manta chat" in client.get(f"{address}/chat").text
            for stream in (False, True):
                body = {"model": "served", "prompt": CANARY, "temperature": 0, "max_tokens": 9}
                first, again = (
                    client.post(f"{url}/v1/completions", json={**body, "stream": stream})
                    for url in (address, self.url)
                )
                assert first.status_code == 200
                assert "x-manta-cache" not in first.headers
                assert again.headers["x-manta-cache"] == "hit"
                assert again.text == first.text

    def no_prompt_or_answer_is_in_a_log_or_in_storage(self) -> None:
        folders = (Path(self.lab.record["temp_dir"]), self.lab.storage)
        files = [f for folder in folders for f in folder.rglob("*") if f.is_file()]
        assert any(f.parent.parent.name == "usage" for f in files)
        assert [f for f in files if CANARY.encode() in f.read_bytes()] == []

    def a_replica_whose_engine_died_ends_and_is_replaced(self) -> None:
        def pids(title: str) -> set[int]:
            found = psutil.process_iter(["cmdline"])
            titles = {p.pid: " ".join(p.info["cmdline"] or ()) for p in found}
            ours = {p.pid for p in processes.members(self.lab.record["cluster_id"])}
            return {pid for pid, told in titles.items() if title in told} & ours

        title = "ray::ServeReplica:llm:LLMServer"
        before = pids(title)
        os.kill(pids("VLLM::EngineCore").pop(), signal.SIGKILL)
        poll("end of its replica", lambda: bool(before - pids(title)), timeout_s=10)
        client = self.client(self.owners_key)
        poll("new replica", lambda: not raises(openai.OpenAIError, num_chunks, client), 180)

    def no_key_is_in_a_log_or_a_process_list(self) -> None:
        secret = re.compile(rb"manta_[0-9a-f]{12}_[A-Za-z0-9_-]{43}")
        assert secret.fullmatch(self.owners_key.encode())
        logs = [f for f in Path(self.lab.record["temp_dir"]).rglob("*") if f.is_file()]
        assert any("serve" in file.parts for file in logs)
        assert [f for f in logs if secret.search(f.read_bytes())] == []
        for file in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                assert not secret.search(file.read_bytes()), file


def until_known(client: openai.OpenAI) -> None:
    poll("open door", lambda: not raises(openai.AuthenticationError, client.models.list), 2)


def raises(kind: type[Exception], call: Callable[..., object], *arguments: object) -> bool:
    try:
        call(*arguments)
    except kind:
        return True
    return False


def poll(what: str, ready: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not ready():
        assert time.monotonic() < deadline, f"no {what} within {timeout_s} s"
        time.sleep(0.1)


def num_chunks(client: openai.OpenAI) -> int:
    """How many pieces a streamed answer of 12 tokens came in."""
    stream = client.completions.create(
        model="served",
        prompt="import ",
        max_tokens=12,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    return sum(bool(chunk.choices and chunk.choices[0].text) for chunk in stream)


def test_asking_where_nothing_answers_gets_one_line_and_exit_2(lab: Lab) -> None:
    question = {"model": "x", "prompts": ["def "], "url": "http://127.0.0.1:9/v1"}
    output = lab(PYTHON, "jobs/ask.py", "--config", lab.write("ask.yaml", question), ok=2)
    assert "nothing answers at http://127.0.0.1:9/v1" in output
    assert len(output.splitlines()) == 1
