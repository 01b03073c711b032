"""Deploys, failures and rollbacks of a tiny application while clients keep asking it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import tiny_model
import yaml
from load import Ask, Failed, Load, get, stream

from manta import storage
from manta.cluster.record import ClusterRecord
from manta.errors import MantaError
from manta.serving.apps import history, lock, places
from manta.serving.canary import traffic

pytestmark = pytest.mark.timeout(600)

REPOSITORY = Path(__file__).parents[2]
MANTA = str(Path(sys.executable).with_name("manta"))

TINY = """
import asyncio, time
from ray import serve

@serve.deployment(ray_actor_options={"num_cpus": 0.1})
class Tiny:
    def __init__(self, args):
        time.sleep(args.get("init_s", 0))
        if "error" in args:
            raise RuntimeError(args["error"])
        self.text = args["text"]

    async def __call__(self, request):
        await asyncio.sleep(float(request.query_params.get("s", "0.01")))
        return self.text

def app(args):
    options = {"name": args.get("deployment", "Tiny"), "num_replicas": args.get("replicas", 1)}
    return Tiny.options(**options).bind(args)
"""


GUARDED = """
import os
from fastapi import FastAPI, HTTPException
from ray import serve
from manta import storage
from manta.serving.guard.ingress import guarded_class
from manta.spec.guard import GuardConfig

api = FastAPI()

class Model:
    def __init__(self, args):
        self.num, self.args = 0, args

    @api.post("/v1/completions")
    def answer(self):
        self.num += 1
        if self.num == self.args.get("die_after"):
            os._exit(1)
        if self.args.get("fail_every") and self.num % self.args["fail_every"] == 0:
            raise HTTPException(500)
        return {"choices": [{"text": self.args["text"]}]}

def app(args):
    config = GuardConfig(keys="none")
    ingress = serve.ingress(api)(guarded_class(Model, config, storage.root()))
    return serve.deployment(ingress, ray_actor_options={"num_cpus": 0.1}).bind(args)
"""


@dataclass(frozen=True)
class Lab:
    """A cluster, and a folder to write files into."""

    folder: Path
    environment: dict[str, str]
    record: ClusterRecord

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [MANTA, *words],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def __call__(self, *words: str, ok: int = 0) -> str:
        process = self.start(*words)
        try:
            output, _ = process.communicate(timeout=300)
        finally:
            process.kill()
        assert process.returncode == ok, output
        return output

    def file(self, *apps: dict[str, Any]) -> str:
        path = self.folder / f"{apps[0]['name']}.yaml"
        path.write_text(yaml.safe_dump({"applications": list(apps)}))
        return str(path)

    def deploy(self, *apps: dict[str, Any], options: tuple[str, ...] = (), ok: int = 0) -> str:
        return self("deploy", self.file(*apps), *options, ok=ok)

    def url(self, name: str) -> str:
        return f"{self.record.serve_url}/{name}"

    def get(self, name: str) -> str:
        return httpx.get(self.url(name), timeout=30).text

    def statuses(self) -> dict[str, str]:
        return {app["name"]: app["status"] for app in json.loads(self("apps", "--json"))}

    def outcomes(self, name: str) -> list[str]:
        return [
            f"{v.action} {v.outcome.state}" if v.outcome else f"{v.action} unfinished"
            for v in history.read(places.home(self.record), name)
        ]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    folder = Path(tempfile.mkdtemp(prefix="m-", dir="/tmp"))
    (folder / "tiny.py").write_text(TINY)
    (folder / "guarded.py").write_text(GUARDED)
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MANTA_"))},
        "MANTA_HOME": str(folder / "home"),
        "MANTA_STORAGE": str(folder / "storage"),
        "TMPDIR": str(folder),
        "PYTHONPATH": str(folder),  # the cluster's workers find the application here
    }
    up = subprocess.run(
        [MANTA, "up", "--ports", "auto", "--timeout-s", "300", "--json"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    try:
        assert up.returncode == 0, up.stderr
        yield Lab(folder, environment, ClusterRecord(**json.loads(up.stdout)))
    finally:
        subprocess.run([MANTA, "down", "--yes"], env=environment, check=False, timeout=120)
        shutil.rmtree(folder, ignore_errors=True)


def tiny(name: str, **args: object) -> dict[str, Any]:
    return {"name": name, "route_prefix": f"/{name}", "import_path": "tiny:app", "args": args}


def test_no_request_is_lost_in_deploys_failures_a_scale_down_and_rollbacks(lab: Lab) -> None:
    probes = lab.folder / "probes.jsonl"
    probes.write_text(json.dumps({"path": "/", "contains": "two"}))
    check = ("--check", str(probes))
    lab.deploy(tiny("a", text="one", replicas=2))
    seconds = [0.01] * 6 + [1.0] * 2  # some that last longer than a look at the health
    with Load([get(lab.url("a"), s=s) for s in seconds]) as load:
        # Another version, and one replica instead of two.
        checked = lab.deploy(tiny("a", text="two"), options=check)
        assert lab.get("a") == "two"
        refused = lab.deploy(tiny("a", text="bad"), options=check, ok=1)
        broken = tiny("a", text="three", error="no such text")
        failed = lab.deploy(broken, tiny("c", text="new beside it"), ok=1)
        renamed = lab.deploy(tiny("a", text="five", deployment="Other"), ok=1)
        assert lab.get("a") == "two"
        lab("rollback", "a")
        assert lab.get("a") == "one"
    assert load.failures == {}
    assert load.answers.keys() == {"one", "two"}
    assert sum(load.answers.values()) > 100

    assert "`a` passes 1 checks" in checked
    assert "does not contain 'two': 'bad'" in refused
    assert "nothing that runs was touched" in refused
    assert "no such text" in failed
    assert "`c` did not run before and was removed" in failed
    assert "has no deployment `Tiny`, only ['Other']" in renamed
    for text in (failed, renamed):
        assert "went back: " in text
        assert "`a` runs as before" in text
    assert lab.outcomes("a") == [
        "deploy healthy",
        "deploy healthy",
        *["deploy failed"] * 3,
        "rollback healthy",
    ]
    rows = json.loads(lab("apps", "history", "a", "--json"))
    assert [rows[-1][key] for key in ("number", "replaced", "of")] == [6, 2, 1]
    assert "no such text" in rows[3]["outcome"]["why"]
    assert set(lab.statuses()) == {"a"}

    lab("undeploy", "a")
    lab("rollback", "a", "--to", "2")
    assert lab.get("a") == "two"
    assert lab.outcomes("a")[-2:] == ["undeploy removed", "rollback healthy"]
    assert "rollback to 1" in lab("apps", "history")


def test_a_second_deploy_is_told_who_is_at_work_and_a_killed_one_blocks_nobody(lab: Lab) -> None:
    file = lab.file(tiny("d", text="first", init_s=600))
    first = lab.start("deploy", file)
    deadline = time.monotonic() + 60
    while "d" not in history.apps(places.home(lab.record)):
        assert time.monotonic() < deadline, "the first deploy does not begin"
        time.sleep(0.1)
    refused = lab.deploy(tiny("e", text="second"), ok=1)
    assert f"has been changing this cluster since {time.strftime('%Y-')}" in refused
    assert f"(deploy {file})" in refused
    assert "e" not in lab.statuses()
    first.send_signal(signal.SIGKILL)
    first.wait()
    lab.deploy(tiny("d", text="third"))
    late = lab.deploy(tiny("d", text="fourth", init_s=600), options=("--timeout-s", "5"), ok=1)
    assert "not healthy after 5 s" in late
    assert lab.get("d") == "third"
    assert lab.outcomes("d") == ["deploy unfinished", "deploy healthy", "deploy failed"]


def test_a_version_that_fails_more_requests_than_the_one_before_goes_back(lab: Lab) -> None:
    def guarded(**args: object) -> dict[str, Any]:
        return {**tiny("g", **args), "import_path": "guarded:app"}

    options = ("--observe-s", "20")
    lab.deploy(guarded(text="old"))
    done = threading.Event()

    def ask() -> None:
        with httpx.Client(timeout=30) as client:
            while not done.wait(0.02):
                client.post(f"{lab.url('g')}/v1/completions", json={"prompt": "x"})

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        output = lab.deploy(guarded(text="new", fail_every=5), options=options, ok=1)
    finally:
        done.set()
        asking.join()
    assert "`g` is worse than before" in output
    assert "before, 0.0% did" in output
    assert "went back: `g` runs as before" in output
    assert '"old"' in httpx.post(f"{lab.url('g')}/v1/completions", json={"prompt": "x"}).text


def guarded(**args: object) -> dict[str, Any]:
    return {**tiny("h", **args), "import_path": "guarded:app"}


def complete(url: str, key: str) -> Ask:
    """A question to an application with a guard; the answer's text is what it counts as."""

    async def ask(client: httpx.AsyncClient) -> str:
        answer = await client.post(
            f"{url}/v1/completions",
            json={"prompt": "x"},
            headers={"Authorization": f"Bearer {key}"},
        )
        if answer.status_code != 200:
            raise Failed(f"{answer.status_code} {answer.text}")
        return str(answer.json()["choices"][0]["text"])

    return ask


def clients(url: str) -> Load:
    """Eight, each with a key of its own."""
    return Load([complete(url, f"client-{number}") for number in range(8)], pause_s=0.02)


def until_only(load: Load, text: str, timeout_s: float) -> None:
    """Return once nothing but `text` is answered."""
    deadline = time.monotonic() + timeout_s
    while True:
        load.answers.clear()
        time.sleep(1)
        if load.answers.keys() == {text}:
            return
        assert time.monotonic() < deadline, str(load)


def said(process: subprocess.Popen[str], word: str) -> None:
    """Return once the command has said it."""
    assert process.stdout
    lines = []
    for line in process.stdout:
        lines.append(line)
        if word in line:
            return
    raise AssertionError("".join(lines))


STEPS = ("--step-s", "2", "--max-latency-ratio", "100")  # cores are shared with the load here


def test_a_canary_is_promoted_if_it_is_good_and_removed_if_not_and_no_request_is_lost(
    lab: Lab,
) -> None:
    lab.deploy(guarded(text="old"))
    with clients(lab.url("h")) as load:
        most = (*STEPS, "--canary", "60", "--canary-by", "request")
        wrong = lab.deploy(guarded(text="bad", fail_every=3), options=most, ok=1)
        dying = lab.deploy(guarded(text="bad", die_after=30), options=most, ok=1)
        until_only(load, "old", timeout_s=15)
        good = lab.deploy(
            guarded(text="new"),
            options=(*STEPS, "--shadow", "0.5", "--canary", "50", "--canary-by", "request"),
        )
        until_only(load, "new", timeout_s=15)
    # What the candidate failed, the running version answered.
    assert load.failures == {}
    for output in (wrong, dying):
        assert "the new version answers 60% of the requests" in output
        assert re.search("new version of `h` (is worse|is unhealthy|has lost|does not)", output)
        assert "nothing that runs was touched, and it answers everything again" in output
    assert "is asked copies of 50% of the requests" in good
    assert good.count("`h`: 0 of ") == 2
    assert lab.outcomes("h") == [
        "deploy healthy",
        "deploy failed",
        "deploy failed",
        "deploy healthy",
    ]
    assert "h--candidate" not in lab.statuses()
    assert storage.glob(f"{lab.record.storage_url}/traffic/*") == []


def test_blue_and_green_change_places_at_once_and_back_when_the_deploy_is_interrupted_or_killed(
    lab: Lab,
) -> None:
    lab.deploy(guarded(text="new"))
    words = ("deploy", lab.file(guarded(text="green")), "--canary", "100", "--step-s", "60")
    with clients(lab.url("h")) as load:
        for how in (signal.SIGINT, signal.SIGKILL):
            process = lab.start(*words, "--max-latency-ratio", "100")
            said(process, "the new version answers 100% of the requests")
            until_only(load, "green", timeout_s=5)
            process.send_signal(how)
            until_only(load, "new", timeout_s=traffic.EXPIRY_S + 5)
            output, _ = process.communicate(timeout=60)
            if how == signal.SIGINT:
                assert "the new version is removed; nothing that runs was touched" in output
                assert process.returncode == 130
                assert "h--candidate" not in lab.statuses()
    assert load.failures == {}
    assert lab.outcomes("h")[-2:] == ["deploy left", "deploy unfinished"]


def test_of_two_engines_the_one_that_answers_otherwise_is_refused_and_the_other_promoted(
    lab: Lab,
) -> None:
    if "MANTA_ROLLOUT_ENGINE" not in os.environ:
        pytest.skip("four engines start, minutes: MANTA_ROLLOUT_ENGINE=1")
    for name, seed in (("right", 0), ("wrong", 1)):
        tiny_model.write(f"{lab.folder}/storage", name, seed=seed)
    lab.deploy(engine(lab, "right"))
    secret = json.loads(lab("keys", "make", "streams", "--requests-per-min", "9999", "--json"))
    headers = {"Authorization": f"Bearer {secret['secret']}"}
    until(lambda: httpx.get(lab.url("e/v1/models"), headers=headers).status_code == 200, 10)
    question = {"model": "e", "prompt": "import os\nclass", "max_tokens": 8, "temperature": 0}
    known = httpx.post(lab.url("e/v1/completions"), json=question, headers=headers, timeout=60)
    checks = lab.folder / "checks.jsonl"
    text = known.json()["choices"][0]["text"]
    assert text.strip()
    question["contains"] = text
    checks.write_text(json.dumps({k: question[k] for k in ("prompt", "max_tokens", "contains")}))
    few = ("--step-s", "5", "--min-requests", "2", "--max-latency-ratio", "100")
    most = (*few, "--check", str(checks), "--canary", "10,50", "--canary-by", "request")
    with Load([stream(lab.url("e"), "e")] * 2, headers=headers, pause_s=0.1) as load:
        refused = lab.deploy(engine(lab, "wrong"), options=most, ok=1)
        assert load.answers.keys() == {"running"}
        promoted = lab.deploy(engine(lab, "right", max_model_len=240), options=most)
        ended = load.answers["running"]
        until(lambda: load.answers["running"] > ended + 20, 60)
    print(f"\n{load}\n{refused}\n{promoted}")
    assert (load.failures, load.wrong, load.num_hung) == ({}, [], 0)
    assert load.answers["candidate"] >= 2
    assert "nothing that runs was touched" in refused
    assert lab.outcomes("e") == ["deploy healthy", "deploy failed", "deploy healthy"]
    assert "e--candidate" not in lab.statuses()
    limit = httpx.get(lab.url("e/v1/models"), headers=headers).json()["data"][0]["max_model_len"]
    assert limit == 240
    until(lambda: used(lab, "streams") == load.num_requests + 1, 10)
    lab("undeploy", "e")


def engine(lab: Lab, model: str, **changes: Any) -> dict[str, Any]:
    """The shipped LLM application with a tiny model."""
    config = yaml.safe_load((REPOSITORY / "serve_apps" / "llm.yaml").read_text())
    (app,) = config["applications"]
    (llm,) = app["args"]["llm_configs"]
    llm["model_loading_config"] = {"model_id": "e", "model_source": model}
    llm["engine_kwargs"] |= {"max_model_len": 256} | changes
    del llm["deployment_config"]["autoscaling_config"]
    return dict(app, name="e", route_prefix="/e")


def used(lab: Lab, name: str) -> int:
    """Requests that the key is said to have made."""
    rows = json.loads(lab("keys", "usage", "--json"))
    return sum(row["num_requests"] for row in rows if row["name"] == name)


def until(ready: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_without_rollback_a_failed_version_stays_and_what_serve_deploy_made_is_kept_as_one(
    lab: Lab,
) -> None:
    serve = str(Path(sys.executable).with_name("serve"))
    entries = [tiny("f", text="by serve")]
    path = lab.folder / "plain.yaml"
    path.write_text(yaml.safe_dump({"applications": entries}))
    environment = lab.environment | lab.record.client_environment()
    subprocess.run([serve, "deploy", str(path)], env=environment, check=True, timeout=120)
    deadline = time.monotonic() + 60
    while lab.statuses() != {"f": "RUNNING"}:  # plain `serve deploy` deletes all others
        assert time.monotonic() < deadline, lab("apps")
        time.sleep(0.5)
    output = lab.deploy(tiny("f", error="no f"), options=("--no-rollback",), ok=1)
    assert "left as it is" in output
    assert lab.statuses() == {"f": "DEPLOY_FAILED"}
    assert lab.outcomes("f") == ["found healthy", "deploy failed"]
    lab("rollback", "f")
    assert lab.get("f") == "by serve"


def test_the_lock_holds_on_an_object_store(object_store: dict[str, str]) -> None:
    url = "s3://manta/rollout"
    assert storage.write_new(f"{url}/x.json", {"n": 1})
    assert not storage.write_new(f"{url}/x.json", {"n": 2})
    assert storage.read_json(f"{url}/x.json") == {"n": 1}
    names = ("gcs_address", "dashboard_url", "serve_url", "token_path", "temp_dir", "started_at")
    cluster = ClusterRecord(
        name="c", cluster_id="c", pid=1, storage_url=url, **dict.fromkeys(names, "")
    )
    gate, results = threading.Barrier(4), []

    def want() -> None:
        gate.wait()
        with contextlib.suppress(MantaError), lock.held(cluster, "x", print):
            results.append("held")
            time.sleep(3)  # longer than the others take to ask

    threads = [threading.Thread(target=want) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == ["held"]
