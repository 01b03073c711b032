"""`python jobs/prepare.py` as a user runs it, on one real Ray cluster and a real S3 API."""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from small_disk import small_disk

from manta import storage
from manta.workloads import packing, tokenizer

REPOSITORY = Path(__file__).parents[2]
SCRIPT = str(REPOSITORY / "jobs" / "prepare.py")
TIMEOUT_S = 240

HOLD_CLUSTER = """
import ray, sys
ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
print("address", ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""

# The job with tiny tasks and shards, so that a small input is spread as a large one would be.
SMALL_TASKS = """
import sys
from manta.spec import PrepareConfig
from manta.workloads import entry, prepare, shards
shards.TASK_FILES = int(sys.argv.pop(1))
shards.SMALL_SHUFFLE_SHARDS = int(sys.argv.pop(1))
prepare.SMALL_SHARD_BYTES = 40_000
entry.run(PrepareConfig, prepare.prepare, "prepare")
"""


@dataclass(frozen=True)
class Run:
    """What a user saw of one run."""

    code: int
    stdout: str
    stderr: str


@pytest.fixture(scope="module")
def environment(object_store: dict[str, str]) -> Iterator[dict[str, str]]:
    """The environment of a client of a running cluster, whose tasks reach the S3 server."""
    with tempfile.TemporaryDirectory(prefix="m-", dir="/tmp") as temp:  # short: socket paths
        token = Path(temp, "token")
        token.write_text("0" * 64)
        env = {
            **{key: value for key, value in os.environ.items() if not key.startswith("RAY_")},
            **object_store,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_TMPDIR": temp,
        }
        holder = subprocess.Popen(
            [sys.executable, "-c", HOLD_CLUSTER],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        lines = (line.split() for line in holder.stdout or ())
        address = next((line[1] for line in lines if line[:1] == ["address"]), None)
        assert address, "the cluster did not start"
        yield {**env, "RAY_ADDRESS": address}
        holder.communicate()  # closes its stdin: it ends, and its cluster with it


@pytest.fixture
def job(environment: dict[str, str], tmp_path: Path):
    """Runs the job with some parameters; its storage root is `tmp_path / "store"`."""

    def run(command: list[str] | None = None, root: str | None = None, **parameters) -> Run:
        process = start(command, root, **parameters)
        stdout, stderr = process.communicate(timeout=TIMEOUT_S)
        return Run(process.returncode, stdout, stderr)

    def start(command: list[str] | None = None, root: str | None = None, **parameters):
        handle, config = tempfile.mkstemp(".yaml", dir=tmp_path)  # several may run at a time
        with os.fdopen(handle, "w") as file:
            yaml.safe_dump({"name": "small", **parameters}, file)
        return subprocess.Popen(
            [*(command or [sys.executable, SCRIPT]), "--config", config],
            env={**environment, storage.ROOT_VARIABLE: root or str(tmp_path / "store")},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    run.start = start
    return run


def small_tasks(files_a_task: int, small_shuffle_shards: int = 64) -> list[str]:
    return [sys.executable, "-c", SMALL_TASKS, str(files_a_task), str(small_shuffle_shards)]


def document(seed: int, num_words: int = 200) -> str:
    words = random.Random(seed)
    return " ".join(f"word{words.randrange(300)}" for _ in range(num_words))


def text_files(folder: Path, count: int) -> str:
    """`count` different documents, two copies of one, and a short one; returns their glob."""
    folder.mkdir(exist_ok=True)
    for number in range(count):
        (folder / f"{number}.txt").write_text(document(number))
    (folder / "copy.txt").write_text(document(0) + "  \r\n")
    (folder / "copy again.txt").write_text(document(0))
    (folder / "short.txt").write_text("short")
    return str(folder / "*.txt")


SMALL = {
    "validation_fraction": 0.2,
    "sequence_length": 32,
    "tokenizer": {"vocab_size": 400},
}


def dataset(root: Path | str) -> str:
    folder = storage.join(str(root), "datasets", "small")
    return storage.join(folder, storage.read_bytes(f"{folder}/LATEST").decode().strip())


def hashes(url: str) -> dict[str, str]:
    sealed = storage.verify(url, "dataset")["files"]
    return {name: content["sha256"] for name, content in sealed.items()}


def table(url: str, split: str) -> pa.Table:
    files = storage.glob(f"{url}/{split}/*.parquet")
    return pa.concat_tables([packing.read_parquet(storage.read_bytes(file)) for file in files])


def test_a_dataset_holds_every_document_once_in_blocks_of_the_asked_length(job, tmp_path):
    result = job(inputs=[text_files(tmp_path / "in", 60)], **SMALL)
    assert result.code == 0, result.stderr
    assert result.stderr == ""
    url = dataset(tmp_path / "store")
    manifest = storage.read_json(f"{url}/manifest.json")
    held_out = table(url, "validation_text")
    trained, end_of_text = tokenizer.load(f"{url}/tokenizer")

    train = table(url, "train").column("input_ids").to_pylist()
    assert {len(block) for block in train} == {32}
    stream = [token for block in train for token in block]
    texts = trained.decode(stream, skip_special_tokens=False).split("<|endoftext|>")
    expected = {document(number) for number in range(60)}
    assert set(held_out.column("text").to_pylist()) <= expected
    assert set(texts[:-1]) <= expected - set(held_out.column("text").to_pylist())
    assert len(texts) - 1 + len(held_out) in (59, 60)  # the last may be cut by the block's end
    assert stream.count(end_of_text) == len(texts) - 1

    assert manifest["documents"] == {
        "read": 63, "kept": 60, "used": 60, "too_short": 1, "duplicates": 2, "not_text": 0,
    }  # fmt: skip
    assert manifest["train"]["blocks"] == len(train)
    assert manifest["train"]["tokens"] == len(stream)
    assert manifest["validation"]["documents"] == len(held_out)
    assert manifest["vocab_size"] == 400
    assert manifest["sequence_length"] == 32
    assert len(manifest["inputs"]) == 63
    counts = storage.read_json(f"{url}/unigram.json")["counts"]
    assert counts == [stream.count(token) for token in range(400)]
    sealed = storage.verify(url, "dataset")
    assert sealed["version"] == manifest["version"] == url.rpartition("/")[2]
    sealed["files"].pop("manifest.json")
    assert sealed["files"] == manifest["outputs"]


def test_same_input_and_config_give_the_same_version_at_once_and_any_change_another(job, tmp_path):
    glob = text_files(tmp_path / "in", 40)
    assert job(inputs=[glob], **SMALL).code == 0
    first = dataset(tmp_path / "store")
    sealed_at = Path(first, storage.SEAL).stat().st_mtime_ns

    again = job(inputs=[glob], **SMALL)
    assert again.code == 0
    assert "same input and config, same version" in again.stdout
    assert dataset(tmp_path / "store") == first
    assert Path(first, storage.SEAL).stat().st_mtime_ns == sealed_at

    assert job(inputs=[glob], **{**SMALL, "sequence_length": 16}).code == 0
    second = dataset(tmp_path / "store")
    (tmp_path / "in" / "1.txt").write_text(document(1001))
    assert job(inputs=[glob], **SMALL).code == 0
    assert len({first, second, dataset(tmp_path / "store")}) == 3


def test_output_is_the_same_byte_for_byte_whatever_the_parallelism_and_the_shuffle(job, tmp_path):
    glob = text_files(tmp_path / "in", 90)
    found = []
    for root, command in (("one", small_tasks(1000)), ("many", small_tasks(8, 0))):
        result = job(command, root=str(tmp_path / root), inputs=[glob], **SMALL)
        assert result.code == 0, result.stderr
        found.append(hashes(dataset(tmp_path / root)))
    assert found[0] == found[1]
    assert len([name for name in found[0] if name.startswith("train/")]) > 2
    url = dataset(tmp_path / "many")
    ids = table(url, "validation_text").column("id").to_pylist()
    assert ids == sorted(set(ids))
    assert storage.read_json(f"{url}/manifest.json")["documents"]["kept"] == 90


def test_max_documents_takes_the_first_by_hash_over_all_shards(job, tmp_path):
    glob = text_files(tmp_path / "in", 90)
    command = small_tasks(10)
    result = job(command, inputs=[glob], max_documents=50, **SMALL)
    assert result.code == 0, result.stderr
    manifest = storage.read_json(f"{dataset(tmp_path / 'store')}/manifest.json")
    documents = manifest["train"]["documents"] + manifest["validation"]["documents"]
    assert documents == manifest["documents"]["used"] == 50


def test_jsonl_gzip_and_parquet_are_read_together_and_not_text_is_skipped_aloud(job, tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    lines = [json.dumps({"body": document(number)}) for number in range(20)]
    (source / "a.jsonl").write_text("\n".join(lines))
    zipped = [json.dumps({"body": document(number)}) for number in range(15, 40)]
    (source / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(zipped).encode()))
    pq.write_table(
        pa.table({"body": [document(number) for number in range(40, 60)]}), source / "c.parquet"
    )
    (source / "d.txt").write_text(document(60))
    (source / "picture.bin").write_bytes(bytes(range(256)))
    result = job(inputs=[str(source)], text_field="body", **SMALL)
    assert result.code == 0, result.stderr
    assert "warning: skipped 1 files that are not text" in result.stdout
    assert "picture.bin" in result.stdout
    manifest = storage.read_json(f"{dataset(tmp_path / 'store')}/manifest.json")
    assert manifest["documents"] == {
        "read": 66, "kept": 61, "used": 61, "too_short": 0, "duplicates": 5, "not_text": 1,
    }  # fmt: skip


def test_everything_works_from_s3_to_s3(job, tmp_path):
    for number in range(30):
        storage.write_bytes(f"s3://manta/in/{number}.txt", document(number).encode())
    pq.write_table(pa.table({"text": [document(30)]}), tmp_path / "x.parquet")
    storage.write_bytes("s3://manta/in/x.parquet", (tmp_path / "x.parquet").read_bytes())
    parameters = {"inputs": ["s3://manta/in/*"], **SMALL}

    result = job(root="s3://manta/store", **parameters)
    assert result.code == 0, result.stderr
    url = dataset("s3://manta/store")
    storage.verify(url, "dataset")
    assert storage.read_json(f"{url}/manifest.json")["documents"]["kept"] == 31
    assert not storage.exists(f"{url}/work")
    assert "same version" in job(root="s3://manta/store", **parameters).stdout

    storage.write_bytes(f"{url}/unigram.json", b"{}")
    before = storage.read_json(f"{url}/{storage.SEAL}")
    result = job(root="s3://manta/store", **parameters)
    assert "unfinished or damaged: removing it" in result.stdout
    assert storage.verify(url, "dataset") == before


def test_a_trained_tokenizer_can_be_loaded_for_another_dataset(job, tmp_path):
    glob = text_files(tmp_path / "in", 40)
    assert job(inputs=[glob], **SMALL).code == 0
    folder = f"{dataset(tmp_path / 'store')}/tokenizer"
    other = {**SMALL, "tokenizer": {"load": folder}}
    assert job(inputs=[text_files(tmp_path / "other", 50)], **other).code == 0
    assert tokenizer.read_folder(f"{dataset(tmp_path / 'store')}/tokenizer") == (
        tokenizer.read_folder(folder)
    )


def test_a_run_that_is_killed_leaves_nothing_that_looks_whole_and_the_next_one_cleans_up(
    job, tmp_path
):
    glob = text_files(tmp_path / "in", 60)
    process = job.start(inputs=[glob], **SMALL)
    deadline = time.monotonic() + TIMEOUT_S
    while not (half := list((tmp_path / "store").glob("datasets/small/*/work/*"))):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    folder = half[0].parents[1]
    assert not (folder / storage.SEAL).exists()
    assert not (folder.parent / "LATEST").exists()

    litter = folder / "train" / "litter.parquet"
    litter.parent.mkdir(exist_ok=True)
    litter.write_bytes(b"cut")
    result = job(inputs=[glob], **SMALL)
    assert result.code == 0, result.stderr
    assert "unfinished or damaged: removing it" in result.stdout
    assert not litter.exists()
    assert not (folder / "work").exists()
    assert hashes(dataset(tmp_path / "store"))


def test_a_full_disk_is_said_in_one_line_and_leaves_nothing(job, tmp_path):
    glob = text_files(tmp_path / "in", 60)
    with small_disk(tmp_path / "store", "40k"):
        result = job(inputs=[glob], **SMALL)
        assert list((tmp_path / "store").rglob("*.parquet")) == []
    assert result.code == 1
    assert_one_line(result, "No space left on device", "free some space and run the step again")


def test_a_cluster_that_does_not_answer_is_said_at_once(environment, job, tmp_path, monkeypatch):
    monkeypatch.setitem(environment, "RAY_ADDRESS", "127.0.0.1:1")
    result = job(inputs=[text_files(tmp_path / "in", 3)], **SMALL)
    assert result.code == 1
    assert_one_line(result, "no Ray cluster answers (127.0.0.1:1: Connection refused)", "manta up")


def assert_one_line(result: Run, *parts: str) -> None:
    assert result.stderr.startswith("error: "), result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    for part in parts:
        assert part in result.stderr


def bad_inputs(folder: Path) -> dict[str, tuple[dict, list[str]]]:
    """Case → parameters, and what the message must say."""
    fine = "\n".join(json.dumps({"text": document(number)}) for number in range(20))
    (folder / "bad.jsonl").write_text(f"{fine}\n{{oops\n")
    (folder / "key.jsonl").write_text(f'{fine}\n{{"body": "x"}}\n')
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress(fine.encode())[:-50])
    pq.write_table(pa.table({"body": ["x"]}), folder / "column.parquet")
    (folder / "cut.parquet").write_bytes((folder / "column.parquet").read_bytes()[:-9])
    (folder / "binary.txt").write_bytes(b"\0\1" * 500)
    (folder / "short.txt").write_text("short")
    (folder / "one.txt").write_text(document(1))
    (folder / "fine.jsonl").write_text(fine)
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    at = {path.name: str(path) for path in folder.iterdir()}
    few = {"validation_fraction": 0.001}
    return {
        "missing file": ({"inputs": [str(folder / "none.txt")]}, ["none.txt matches no file"]),
        "empty glob": ({"inputs": [str(folder / "*.none")]}, ["*.none matches no file"]),
        "missing bucket": ({"inputs": ["s3://none/a/*.txt"]}, ["s3://none/a/*.txt"]),
        "line": ({"inputs": [at["bad.jsonl"]]}, ["bad.jsonl:21: not JSON"]),
        "key": ({"inputs": [at["key.jsonl"]]}, ["key.jsonl:21: no text under `text`", "body"]),
        "cut gzip": ({"inputs": [at["cut.jsonl.gz"]]}, ["cut.jsonl.gz: cannot be read"]),
        "column": ({"inputs": [at["column.parquet"]]}, ["no column `text`", "body"]),
        "cut parquet": ({"inputs": [at["cut.parquet"]]}, ["not a readable Parquet file"]),
        "only binary": ({"inputs": [at["binary.txt"]]}, ["no document is left", "not UTF-8"]),
        "only short": ({"inputs": [at["short.txt"]]}, ["no document is left", "lower min_doc"]),
        "validation": ({"inputs": [at["fine.jsonl"]], **few}, ["validation split is empty"]),
        "block": (
            {"inputs": [at["fine.jsonl"]], "sequence_length": 100_000},
            ["too few for one block of 100000", "sequence_length"],
        ),
        "vocabulary": (
            {"inputs": [at["one.txt"], at["fine.jsonl"]], "tokenizer": {"vocab_size": 9000}},
            ["vocab_size is 9,000", "yield only"],
        ),
        "tokenizer": (
            {"inputs": [at["fine.jsonl"]], "tokenizer": {"load": str(folder / "tokenizer")}},
            ["tokenizer.json does not load"],
        ),
        "no tokenizer": (
            {"inputs": [at["fine.jsonl"]], "tokenizer": {"load": str(folder / "none")}},
            ["has no tokenizer.json"],
        ),
        "misspelt key": (
            {"inputs": [at["fine.jsonl"]], "sequence_lenght": 8},
            ["unknown key `sequence_lenght`", "did you mean `sequence_length`?"],
        ),
    }


def test_bad_input_gets_one_clear_line_exit_code_2_and_leaves_nothing(job, tmp_path, subtests):
    (tmp_path / "in").mkdir()
    cases = bad_inputs(tmp_path / "in")
    # Most of a run is start-up on one core: three at a time.
    with ThreadPoolExecutor(max_workers=3) as pool:
        runs = {
            case: pool.submit(job, root=str(tmp_path / "store" / case), **{**SMALL, **parameters})
            for case, (parameters, _) in cases.items()
        }
    for case, (_, parts) in cases.items():
        with subtests.test(case):
            result = runs[case].result()
            assert_one_line(result, *parts)
            assert result.code == 2
            left = tmp_path / "store" / case
            assert [path for path in left.rglob("*") if path.is_file()] == []
