"""Training and search on a real Ray cluster: they learn, survive kills, refuse what is wrong."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from small_disk import small_disk

from manta import storage

pytestmark = pytest.mark.timeout(900)
WAIT_S = 400  # of one job; a run takes some 20 s on an idle machine
PROJECT = Path(__file__).parents[2]
LENGTH, VOCABULARY = 32, 300
HOLD = (
    "import ray, sys;"
    "info = ray.init(num_cpus=4, include_dashboard=False, _temp_dir=sys.argv[1],"
    " object_store_memory=10**9).address_info;"
    "print(info['gcs_address'], flush=True); sys.stdin.read()"
)
TRAIN: dict[str, Any] = {
    "dataset": "tiny",
    "num_steps": 24,
    "global_batch_size": 8,
    "micro_batch_size": 2,
    "checkpoint_every_steps": 4,
    "validate_every_steps": 8,
    "num_validation_sequences": 9,
    "log_every_steps": 2,
    "optimizer": {"learning_rate": 1.0e-2},
    "model": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
}
SEARCH: dict[str, Any] = {
    "search": {
        "optimizer.learning_rate": {"log_uniform": [1.0e-4, 2.0e-2]},
        "optimizer.weight_decay": {"choice": [0.0, 0.1]},
    },
    "num_trials": 4,
    "num_steps": 8,
    "grace_steps": 2,
}


@dataclass(frozen=True)
class Lab:
    """A running cluster, a storage root, and the jobs one starts on them."""

    folder: Path
    environment: dict[str, str]

    @property
    def root(self) -> str:
        return self.environment["MANTA_STORAGE"]

    def at(self, root: str) -> Lab:
        """The same cluster with another storage root."""
        return Lab(self.folder, self.environment | {"MANTA_STORAGE": root})

    def url(self, *parts: str) -> str:
        return storage.join(self.root, *parts)

    def start(self, job: str, config: dict[str, Any], **changes: Any) -> Job:
        file = self.folder / f"{job}-{secrets.token_hex(4)}.yaml"
        file.write_text(yaml.safe_dump({**config, **changes}))
        log = file.with_suffix(".log")
        with log.open("w") as out:
            process = subprocess.Popen(
                [sys.executable, str(PROJECT / "jobs" / f"{job}.py"), "--config", str(file)],
                cwd=self.folder,
                env=self.environment,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        return Job(process, log)

    def run(self, job: str, config: dict[str, Any], exit_code: int = 0, **changes: Any) -> str:
        """Run a job to its end; its output."""
        started = self.start(job, config, **changes)
        code = started.process.wait(timeout=WAIT_S)
        output = started.log.read_text()
        assert code == exit_code, output
        return output

    def records(self, name: str) -> list[dict[str, float]]:
        url = self.url("train", name, "metrics.jsonl")
        if not storage.exists(url):
            return []
        return [json.loads(line) for line in storage.read_bytes(url).splitlines()]

    def wait_for_step(self, name: str, step: int, job: Job) -> None:
        poll(lambda: any(r["step"] >= step for r in self.records(name)), job)


@dataclass(frozen=True)
class Job:
    """A job script that runs as the driver of its own Ray job."""

    process: subprocess.Popen[bytes]
    log: Path


def poll(condition: Callable[[], bool], job: Job) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert job.process.poll() is None, "the job ended early\n" + job.log.read_text()
        assert time.monotonic() < deadline, job.log.read_text()
        time.sleep(0.05)


def write_dataset(root: str, name: str = "tiny", version: str = "v1") -> None:
    """A sealed dataset of text that repeats itself, so that a tiny model learns it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        ["import sys\ndef main():\n    return sys.path\n"],
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet
        ),
    )
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder)
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
        fast.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        fast.save_pretrained(str(local / "tokenizer"))
        starts = np.random.default_rng(0).integers(0, 250, size=200)
        for split, chosen in (("validation", starts[:20]), ("train", starts[20:])):
            (local / split).mkdir()
            rows = [[(start + 7 * i) % 250 for i in range(LENGTH)] for start in chosen]
            table = pa.table({"input_ids": pa.array(rows, pa.list_(pa.int32()))})
            pq.write_table(table, local / split / "0.parquet", row_group_size=32)
        facts = {"version": version, "sequence_length": LENGTH, "vocab_size": len(fast)}
        (local / "manifest.json").write_text(json.dumps(facts))
        storage.upload(local, storage.join(root, "datasets", name, version), {"kind": "dataset"})
    storage.write_bytes(storage.join(root, "datasets", name, "LATEST"), version.encode())


@pytest.fixture(scope="module")
def lab(object_store: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("lab")
    root = str(tmp_path_factory.mktemp("storage"))
    ray_folder = tempfile.mkdtemp(prefix="m-", dir="/tmp")  # socket paths are limited to 107
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MANTA_"))},
        **object_store,
        "MANTA_STORAGE": root,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_raylet_start_wait_time_s": "120",  # the machine may be busy
        "HF_HUB_OFFLINE": "1",
    }
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, ray_folder],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    address = holder.stdout.readline().strip()
    assert address, "the cluster did not start"
    write_dataset(root)
    yield Lab(folder, environment | {"RAY_ADDRESS": address, "MANTA_TEST_HOLDER": str(holder.pid)})
    holder.communicate(timeout=60)
    shutil.rmtree(ray_folder, ignore_errors=True)


@pytest.fixture(scope="module")
def undisturbed(lab: Lab) -> list[dict[str, float]]:
    """Records of the run that the killed ones are compared with."""
    lab.run("train", TRAIN, name="calm")
    return lab.records("calm")


def workers(lab: Lab) -> list[psutil.Process]:
    """Ray Train's worker processes of this cluster."""
    holder = psutil.Process(int(lab.environment["MANTA_TEST_HOLDER"]))
    found = []
    for process in holder.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


def checkpoints(lab: Lab, name: str) -> list[Path]:
    return sorted(Path(lab.root, "train", name).glob("checkpoint_0*"))


def assert_same_end(found: list[dict[str, float]], wanted: list[dict[str, float]]) -> None:
    assert [r["step"] for r in found] == [r["step"] for r in wanted]
    for key in ("loss", "validation_loss", "grad_norm"):
        assert found[-1][key] == pytest.approx(wanted[-1][key], rel=1e-5)


def test_a_run_learns_and_exports_a_model_that_transformers_loads(
    lab: Lab, undisturbed: list[dict[str, float]]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert undisturbed[-1]["validation_loss"] < 0.6 * undisturbed[0]["loss"]
    assert undisturbed[-1]["tokens_per_s"] > 0
    model_url = lab.url("models", "calm")
    facts = storage.verify(model_url, "model")
    assert facts["dataset"] == {"reference": "tiny", "version": "v1"}
    assert facts["metrics"]["validation_loss"] == undisturbed[-1]["validation_loss"]
    model, report = AutoModelForCausalLM.from_pretrained(model_url, output_loading_info=True)
    assert not any(report.values())
    tokenizer = AutoTokenizer.from_pretrained(model_url)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "x"
    rows = pq.read_table(lab.url("datasets", "tiny", "v1", "validation"))["input_ids"].to_pylist()
    import torch

    tokens = torch.tensor(rows[: TRAIN["num_validation_sequences"]])
    loss = model(input_ids=tokens, labels=tokens).loss.item()
    assert loss == pytest.approx(undisturbed[-1]["validation_loss"], rel=1e-4)
    assert storage.read_bytes(lab.url("train", "calm", "loss.png")).startswith(b"\x89PNG")


def test_a_finished_run_started_again_is_done_at_once_and_refuses_another_config(
    lab: Lab, undisturbed: list[dict[str, float]]
) -> None:
    assert "finished already" in lab.run("train", TRAIN, name="calm")
    output = lab.run("train", TRAIN, name="calm", num_steps=30, exit_code=2)
    assert "num_steps was 24, now 30; give the run another name" in output
    assert "Traceback" not in output


def test_a_killed_worker_is_survived_and_changes_nothing(
    lab: Lab, undisturbed: list[dict[str, float]]
) -> None:
    job = lab.start("train", TRAIN, name="worker-killed")
    lab.wait_for_step("worker-killed", 10, job)
    workers(lab)[-1].kill()
    assert job.process.wait(timeout=WAIT_S) == 0, job.log.read_text()
    assert_same_end(lab.records("worker-killed"), undisturbed)
    assert "going on from step" in job.log.read_text()


def test_a_killed_job_goes_on_and_loses_at_most_one_checkpoint_interval(
    lab: Lab, undisturbed: list[dict[str, float]]
) -> None:
    job = lab.start("train", TRAIN, name="job-killed")
    lab.wait_for_step("job-killed", 14, job)
    victims = workers(lab)
    os.kill(job.process.pid, signal.SIGKILL)
    for victim in victims:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()
    job.process.wait()
    reached = lab.records("job-killed")[-1]["step"]
    output = lab.run("train", TRAIN, name="job-killed")
    resumed = re.search(r"going on from step (\d+)", output)
    assert resumed, output
    assert reached - int(resumed[1]) <= TRAIN["checkpoint_every_steps"]
    assert_same_end(lab.records("job-killed"), undisturbed)
    assert len(checkpoints(lab, "job-killed")) <= 2


def test_a_truncated_newest_checkpoint_gives_way_to_the_one_before(
    lab: Lab, undisturbed: list[dict[str, float]]
) -> None:
    shutil.copytree(lab.url("train", "calm"), lab.url("train", "cut"))
    damaged = next(checkpoints(lab, "cut")[-1].glob("__0_*"))
    damaged.write_bytes(damaged.read_bytes()[:1000])
    output = lab.run("train", TRAIN, name="cut")
    assert re.search(r"warning: checkpoint \S+ is not whole \(__0_0\.distcp", output)
    assert "going on from step 20" in output
    assert_same_end(lab.records("cut"), undisturbed)


def test_sharded_training_computes_what_replicated_does(
    lab: Lab, undisturbed: list[dict[str, float]]
) -> None:
    lab.run("train", TRAIN, name="sharded", scaling={"parallel": "fsdp2"})
    assert lab.records("sharded")[-1]["loss"] == pytest.approx(undisturbed[-1]["loss"], rel=1e-3)
    storage.verify(lab.url("models", "sharded"), "model")


def test_a_disk_that_fills_up_fails_the_run_which_goes_on_when_there_is_room(
    lab: Lab, undisturbed: list[dict[str, float]]
) -> None:
    full = lab.at(str(lab.folder / "small"))
    with small_disk(Path(full.root), "2m"):
        write_dataset(full.root)
        options = {"name": "full", "scaling": {"max_failures": 0}}
        output = full.run("train", TRAIN, exit_code=1, **options)
        assert "No space left on device" in output
        assert "free some space" in output
        assert not storage.exists(storage.join(full.url("models", "full"), storage.SEAL))
        subprocess.run(["mount", "-o", "remount,size=50m", full.root], check=True)
        full.run("train", TRAIN, **options)
        assert_same_end(full.records("full"), undisturbed)
        storage.verify(full.url("models", "full"), "model")


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        (
            {"num_workers": 4, "cpus_per_worker": 2},
            "4 workers of 2 CPU do not fit the cluster, which has 4 CPU; "
            "write scaling.num_workers: 2",
        ),
        ({"gpus_per_worker": 1}, "do not fit the cluster, which has 4 CPU, 0 GPU"),
    ],
)
def test_more_workers_than_the_cluster_can_hold_are_refused_in_one_line(
    lab: Lab, scaling: dict[str, Any], message: str
) -> None:
    output = lab.run("train", TRAIN, name="unfit", exit_code=2, scaling=scaling)
    assert message in output
    assert "Traceback" not in output


def test_the_chain_from_text_to_completions_works_on_an_object_store(lab: Lab) -> None:
    remote = lab.at("s3://manta/chain")
    text = {"name": "tiny", "inputs": [str(PROJECT / "src/platform/manta/spec/*.py")]}
    text |= {"sequence_length": LENGTH, "validation_fraction": 0.3}
    remote.run("prepare", text, tokenizer={"vocab_size": 2 * VOCABULARY})

    base = lab.folder / "base.yaml"
    base.write_text(yaml.safe_dump({**TRAIN, "name": "base"}))
    remote.run("tune", SEARCH, name="remote", base=str(base))
    best = yaml.safe_load(storage.read_bytes(remote.url("tune", "remote", "best.yaml")))
    assert best.keys() == SEARCH["search"].keys()
    assert "finished already" in remote.run("tune", SEARCH, name="remote", base=str(base))

    output = remote.run("train", TRAIN, name="remote", tuned="remote")
    assert "tuned: optimizer.learning_rate" in output
    seal = storage.verify(remote.url("models", "remote"), "model")
    tuned_rate = seal["config"]["optimizer"]["learning_rate"]
    assert tuned_rate == pytest.approx(best["optimizer.learning_rate"])

    remote.run("evaluate", {"model": "remote", "dataset": "tiny", "max_bytes": 20_000})
    assert_scored(remote, seal["dataset"]["version"])

    prompts = lab.folder / "prompts.jsonl"
    prompts.write_text('{"prompt": "def "}\n{"prompt": "class "}\n')
    engine = {"max_model_len": LENGTH, "max_num_seqs": 2, "enforce_eager": True}
    batch = {"name": "remote", "model": "remote", "prompts": str(prompts)}
    sampling = {"max_tokens": 4}
    remote.run("generate", batch, sampling=sampling, engine_kwargs_passthrough=engine)
    (shard,) = storage.glob(remote.url("generations", "remote", "*", "shard-*.parquet"))
    filesystem, path = storage.filesystem(shard)
    rows = pq.read_table(path, filesystem=filesystem).to_pylist()
    assert [row["prompt"] for row in rows] == ["def ", "class "]
    assert all(0 < row["num_generated_tokens"] <= 4 for row in rows)


def assert_scored(lab: Lab, dataset_version: str) -> None:
    """The scores of a barely trained model are where they must be, and on its card."""
    url = lab.url("models", "remote")
    scores = storage.read_json(f"{url}/evaluation.json")["bits_per_byte"]
    assert scores["dataset_version"] == dataset_version
    # Better than equally likely tokens, of which there are more than bytes; worse than text is.
    assert 1 < scores["model"] < np.log2(2 * VOCABULARY)
    assert scores["xz"] <= scores["xz_each_document"]
    assert scores["unigram"] < 8
    seal = storage.verify(url, "model")
    assert seal["metrics"]["bits_per_byte"] == scores["model"]
    card = storage.read_bytes(f"{url}/README.md").decode()
    assert dataset_version in card
    assert f"{scores['model']:.3f}" in card


def test_a_killed_search_goes_on_and_names_its_best(lab: Lab) -> None:
    base = lab.folder / "local-base.yaml"
    base.write_text(yaml.safe_dump({**TRAIN, "name": "base"}))
    config = {**SEARCH, "base": str(base), "num_trials": 6, "num_steps": 64, "grace_steps": 16}
    job = lab.start("tune", config, name="killed")
    experiment = Path(lab.root, "tune", "killed")
    poll(lambda: any(experiment.glob("experiment_state-*.json")), job)
    poll(lambda: "trial 2" in job.log.read_text(), job)
    os.kill(job.process.pid, signal.SIGKILL)
    job.process.wait()
    output = lab.run("tune", config, name="killed")
    assert "going on with search `killed`" in output
    best = yaml.safe_load((experiment / "best.yaml").read_text())
    assert 1e-4 <= best["optimizer.learning_rate"] <= 2e-2
    table = (experiment / "trials.csv").read_text().splitlines()
    assert len(table) == 1 + 6
    assert (experiment / "trials.png").read_bytes().startswith(b"\x89PNG")
    other = {**config, "num_trials": 7}
    assert "other settings of num_trials" in lab.run("tune", other, name="killed", exit_code=2)
