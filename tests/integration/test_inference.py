"""Batch inference and serving on a real cluster with the real vLLM, driven as a user does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import tiny_model
import yaml

from manta.cluster.record import ClusterRecord

# vLLM starts in half a minute on an idle machine, and in minutes on a busy one.
pytestmark = pytest.mark.timeout(900)

REPOSITORY = Path(__file__).parents[2]
PYTHON = sys.executable
MANTA = str(Path(sys.executable).with_name("manta"))
SERVE = str(Path(sys.executable).with_name("serve"))
NUM_ROWS, ROWS_PER_SHARD = 40, 8


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
    tiny_model.write(str(folder / "storage"), "tiny")
    up = subprocess.run(
        [MANTA, "up", "--ports", "auto", "--timeout-s", "300", "--json"],
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
    assert "manta undeploy broken" in output
    assert get(f"{lab.record['serve_url']}/one") == "first"
    lab(MANTA, "undeploy", "broken")
    assert apps(lab) == {"one": "RUNNING"}


def test_an_app_that_cannot_be_imported_fails_with_its_own_error(lab: Lab) -> None:
    output = deploy(lab, "gone", {**hello("gone", "x"), "import_path": "no_such_module:app"}, ok=1)
    assert "No module named 'no_such_module'" in output
    lab(MANTA, "undeploy", "gone")


def test_a_dry_run_prints_the_plain_command_and_changes_nothing(lab: Lab) -> None:
    before = apps(lab)
    file = lab.write("three.yaml", {"applications": [hello("three", "third")]})
    output = lab(MANTA, "deploy", file, "--dry-run")
    assert f"serve deploy {file}" in output
    assert "added     three" in output
    assert apps(lab) == before


def test_the_projects_serve_config_answers_a_streaming_client(lab: Lab) -> None:
    deploy(lab, "one", hello("one", "first"))
    config = yaml.safe_load((REPOSITORY / "serve_apps" / "llm.yaml").read_text())
    llm = config["applications"][0]["args"]["llm_configs"][0]
    llm["model_loading_config"] = {"model_id": "served", "model_source": "tiny"}
    llm["engine_kwargs"]["max_model_len"] = 256
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
    assert chunks(lab) > 1

    lab(MANTA, "undeploy", "llm")
    assert get(f"{lab.record['serve_url']}/one") == "first"


def chunks(lab: Lab) -> int:
    """How many pieces a streamed answer of 12 tokens came in."""
    import openai

    client = openai.OpenAI(base_url=f"{lab.record['serve_url']}/v1", api_key="none", max_retries=0)
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
