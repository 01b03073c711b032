"""Logs in storage: whole after crashes and failed writes, readable while they grow."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from manta.cluster.record import ClusterRecord
from manta.errors import MantaError
from manta.jobs import logs
from manta.jobs import shipper as shipping
from manta.jobs.logs import LogWriter
from manta.jobs.ray_api import RayJob
from manta.jobs.shipper import Shipper


class Flaky(MemoryFileSystem):
    """An object store that loses 30 % of its writes."""

    protocol = "flaky"
    chance = random.Random(7)
    num_failed = 0

    def pipe_file(self, path: str, value: bytes, **options: Any) -> None:
        if self.chance.random() < 0.3:
            Flaky.num_failed += 1
            raise OSError("storage is out of order")
        super().pipe_file(path, value, **options)


@pytest.fixture(scope="module", autouse=True)
def flaky() -> Iterator[None]:
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    yield
    MemoryFileSystem.store.clear()


def text(num_bytes: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(num_bytes)


def test_a_log_is_the_same_however_it_was_cut_and_wherever_the_writer_died(
    tmp_path: Path,
) -> None:
    chance, whole, url = random.Random(1), text(2_000_000), str(tmp_path / "log")
    writer = LogWriter(url)
    while writer.num_bytes < len(whole):
        if chance.random() < 0.2:
            writer = LogWriter(url)  # the one before was killed
        start = writer.num_bytes
        writer.append(whole[start : start + chance.choice((1, 100, 30_000, 700_000))])
    assert b"".join(logs.read(url)) == whole
    for offset in (0, 1, logs.PART_BYTES, 1_234_567, len(whole), len(whole) + 5):
        assert b"".join(logs.read(url, offset)) == whole[offset:]
    assert len(list((tmp_path / "log").iterdir())) <= len(whole) // logs.PART_BYTES + 1


def test_a_write_that_failed_changes_nothing_and_can_be_repeated() -> None:
    whole, writer = text(300_000, 2), LogWriter("flaky://bucket/a")
    while writer.num_bytes < len(whole):
        before = writer.num_bytes
        try:
            writer.append(whole[before : before + 10_000])
        except MantaError:
            assert writer.num_bytes == before
    assert Flaky.num_failed > 0
    assert b"".join(logs.read("flaky://bucket/a")) == whole


def test_nothing_is_there_before_the_first_write(tmp_path: Path) -> None:
    assert list(logs.read(str(tmp_path / "none"))) == []
    assert LogWriter(str(tmp_path / "none")).num_bytes == 0


def place(tmp_path: Path) -> tuple[ClusterRecord, RayJob, Path]:
    """A cluster on this machine as far as its logs go, a job of it, and the job's log."""
    folder = tmp_path / "r" / "session_latest" / "logs"
    folder.mkdir(parents=True)
    cluster = ClusterRecord(
        name="local",
        cluster_id="c",
        pid=0,
        gcs_address="",
        dashboard_url="http://127.0.0.1:9",
        serve_url="",
        token_path="",
        temp_dir=str(tmp_path),
        storage_url="",
        started_at="",
    )
    job = RayJob(
        submission_id="j",
        status="RUNNING",
        entrypoint="",
        message="",
        error_type="",
        exit_code=None,
        node_id="n",
        metadata={},
        started_at=None,
        ended_at=None,
    )
    return cluster, job, folder / "job-driver-j.log"


def finish(shipper: Shipper, *, lost: bool = False) -> str:
    deadline = time.monotonic() + 20
    while (result := shipper.finish("j", lost=lost)) is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return result


def test_a_growing_log_is_shipped_whole_to_a_storage_that_fails_now_and_then(
    tmp_path: Path,
) -> None:
    cluster, job, file = place(tmp_path)
    whole = text(3_000_000, 3)
    shipper = Shipper()
    shipper.start()
    shipper.follow(cluster, job, "flaky://bucket/b")

    def write() -> None:
        with file.open("wb") as stream:
            for start in range(0, len(whole), 100_000):
                stream.write(whole[start : start + 100_000])
                stream.flush()
                time.sleep(0.02)

    writer = threading.Thread(target=write)
    writer.start()
    writer.join()
    assert finish(shipper) == "complete"
    assert b"".join(logs.read("flaky://bucket/b")) == whole
    shipper.close()


def test_a_new_line_is_in_storage_within_two_seconds(tmp_path: Path) -> None:
    cluster, job, file = place(tmp_path)
    file.write_bytes(b"first\n")
    shipper = Shipper()
    shipper.start()
    shipper.follow(cluster, job, str(tmp_path / "log"))
    deadline = time.monotonic() + 2
    while b"".join(logs.read(str(tmp_path / "log"))) != b"first\n":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    shipper.close()


def test_the_next_shipper_goes_on_where_the_last_was_killed(tmp_path: Path) -> None:
    cluster, job, file = place(tmp_path)
    url = str(tmp_path / "log")
    LogWriter(url).append(b"one\n")
    file.write_bytes(b"one\ntwo\n")
    shipper = Shipper()
    shipper.start()
    shipper.follow(cluster, job, url)
    assert finish(shipper) == "complete"
    assert b"".join(logs.read(url)) == b"one\ntwo\n"
    shipper.close()


def test_the_log_of_a_job_whose_cluster_is_gone_is_cut_and_says_so(tmp_path: Path) -> None:
    cluster, job, file = place(tmp_path)
    file.write_bytes(b"half")
    url = str(tmp_path / "log")
    shipper = Shipper()
    shipper.start()
    shipper.follow(cluster, job, url)
    deadline = time.monotonic() + 5
    while not list(logs.read(url)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    file.unlink()
    assert finish(shipper, lost=True) == "cut"
    assert b"".join(logs.read(url)) == b"half"
    shipper.close()


@pytest.mark.parametrize(("num_failures", "result"), [(5, "complete"), (50, "cut")])
def test_a_log_is_given_up_after_a_number_of_tries_and_not_for_its_time_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_failures: int, result: str
) -> None:
    left = [num_failures]

    def fail(self: Flaky, path: str, value: bytes, **options: Any) -> None:
        if left[0]:
            left[0] -= 1
            raise OSError("storage is out of order")
        MemoryFileSystem.pipe_file(self, path, value, **options)

    monkeypatch.setattr(Flaky, "pipe_file", fail)
    monkeypatch.setattr(shipping, "GIVE_UP_S", 0.0)
    monkeypatch.setattr(shipping, "PERIOD_S", 0.01)
    file, url = tmp_path / "driver.log", f"flaky://bucket/given-up-{num_failures}"
    file.write_bytes(b"all of it")
    shipper = Shipper()
    shipper.follow_source("a", url, lambda offset: shipping.FileSource(file, offset))
    assert shipper.finish("a") is None, "it has ended before the first try"
    shipper.start()
    deadline = time.monotonic() + 10
    while (found := shipper.finish("a")) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    shipper.close()
    assert found == result
    assert b"".join(logs.read(url)) == (b"all of it" if result == "complete" else b"")


def test_a_stream_that_breaks_off_is_gone_on_with(tmp_path: Path) -> None:
    """As when a dashboard is restarted, or a tunnel falls: the last chunk never comes."""
    whole, asked = text(300_000, 5), []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            asked.append(self.path)
            told = whole[:100_000] if len(asked) == 1 else whole
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"%x\r\n%b\r\n" % (len(told), told))
            if len(asked) > 1:
                time.sleep(5)  # it goes on: no more is written
            self.close_connection = True

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    cluster, job, _ = place(tmp_path)
    cluster = replace(cluster, dashboard_url=f"http://127.0.0.1:{server.server_port}")
    shipper, url = Shipper(), str(tmp_path / "log")
    shipper.follow_source("j", url, lambda offset: shipping.StreamSource(cluster, job, offset))
    shipper.start()
    deadline = time.monotonic() + 20
    while logs.size(url) < len(whole):
        assert time.monotonic() < deadline, logs.size(url)
        time.sleep(0.05)
    assert finish(shipper) == "complete"
    shipper.close()
    server.shutdown()
    assert b"".join(logs.read(url)) == whole
