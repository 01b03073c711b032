"""A job that writes a very long log.

MANTA_CHAOS_LOG_MIB=1024 pytest -s tests/chaos/test_chaos_log.py
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from arena import Arena
from terminal import MANTA, controller, until

from manta.cluster.record import ClusterRecord
from manta.jobs import logs, queries, ray_api
from manta.jobs.shipper import Shipper, StreamSource

SIZE_MIB = int(os.environ.get("MANTA_CHAOS_LOG_MIB", "100"))
MAX_CONTROLLER_BYTES = 300e6
LINE = b"%012d " + b"x" * 50 + b"\n"  # 64 bytes
WRITER = f"""
import sys
line = {LINE!r}
for block in range({SIZE_MIB}):
    sys.stdout.buffer.write(b"".join(line % (block * 16384 + i) for i in range(16384)))
"""


@pytest.mark.timeout(1200)
def test_a_very_long_log_is_shipped_whole_by_a_small_controller(
    arena: Arena, tmp_path: Path
) -> None:
    (tmp_path / "writer.py").write_text(WRITER)
    arena.submit("long", f"exec python {tmp_path}/writer.py")
    begun = time.monotonic()
    arena.work()
    process = until(lambda: controller(arena.terminal), "a controller is at work")
    with_nothing = process.memory_info().rss
    watch = _Memory(process)
    until(lambda: logs.size(_folder(arena)) > 2**20, "some of it is in storage")
    growing = _logs(arena, tmp_path / "early")
    arena.all_end(900)
    took_s = time.monotonic() - begun
    memory = watch.end()
    late = _logs(arena, tmp_path / "printed")
    driver = f"{arena.record['temp_dir']}/r/session_latest/logs/job-driver-long.log"
    tally = arena.tally(["long"])
    begun = time.monotonic()
    streamed = _sha256_through_the_api(arena, str(tmp_path / "streamed"))
    streamed_s = time.monotonic() - begun
    shipped = _sha256_of_parts(_folder(arena))
    written, printed = _sha256(Path(driver)), _sha256(tmp_path / "printed")
    last = (tmp_path / "printed").read_bytes()[-len(LINE % 0) :]
    num_bytes = logs.size(_folder(arena))
    print(
        f"\n{num_bytes} bytes written and shipped in {took_s:.0f} s; controller at most "
        f"{memory / 1e6:.0f} MB ({with_nothing / 1e6:.0f} MB before); `manta logs` "
        f"{late.max_bytes / 1e6:.0f} MB in {late.took_s:.1f} s, {growing.took_s:.1f} s while it "
        f"grew; shipped through the cluster's API in {streamed_s:.0f} s; {tally}"
    )
    assert tally.is_clean
    assert queries.attempts_of(arena.state, "long")[0].log_state == "complete"
    assert num_bytes >= SIZE_MIB * 2**20
    assert shipped.hexdigest() == written.hexdigest() == printed.hexdigest()
    assert streamed.hexdigest() == written.hexdigest()
    assert last == LINE % (SIZE_MIB * 16384 - 1)
    assert (tmp_path / "early").stat().st_size > 2**20
    assert memory < MAX_CONTROLLER_BYTES


@dataclass(frozen=True)
class _Command:
    took_s: float
    max_bytes: int


def _logs(arena: Arena, target: Path) -> _Command:
    """`manta logs` into a file; how long it took, and its memory at most."""
    begun = time.monotonic()
    with target.open("wb") as output:
        process = subprocess.Popen(
            [MANTA, "logs", "long"], env=arena.terminal.environment, stdout=output
        )
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return _Command(time.monotonic() - begun, usage.ru_maxrss * 1024)


class _Memory:
    """The most memory that a process was seen to hold, in bytes."""

    def __init__(self, process: psutil.Process) -> None:
        self._process, self._most = process, 0
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def end(self) -> int:
        self._ending.set()
        self._thread.join()
        return self._most

    def _look(self) -> None:
        while not self._ending.wait(0.1):
            self._most = max(self._most, self._process.memory_info().rss)


def _folder(arena: Arena) -> str:
    return logs.folder(arena.job("long").storage_url, "long", 1)


def _sha256_through_the_api(arena: Arena, url: str) -> hashlib._Hash:
    """Ship the log again, the way that it comes from a cluster on other machines."""
    place = ClusterRecord(**arena.record)
    job = ray_api.find(place, "long")
    assert job is not None
    shipper = Shipper()
    shipper.follow_source("long", url, lambda offset: StreamSource(place, job, offset))
    shipper.start()
    until(lambda: shipper.finish("long"), "it is shipped", 600)
    assert shipper.finish("long") == "complete"
    shipper.close()
    return _sha256_of_parts(url)


def _sha256_of_parts(url: str) -> hashlib._Hash:
    digest = hashlib.sha256()
    for piece in logs.read(url):
        digest.update(piece)
    return digest


def _sha256(file: Path) -> hashlib._Hash:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256")
