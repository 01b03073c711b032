"""Ships the logs of running attempts from the cluster to storage, in a thread of its own.

What storage refuses is offered again; the position moves only after a write. So a storage that
fails now and then costs time, and a full one stops the shipping and never the job.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from manta.cluster.record import ClusterRecord
from manta.errors import MantaError
from manta.jobs import ray_api
from manta.jobs.logs import LogWriter
from manta.jobs.ray_api import RayJob

PERIOD_S = 0.25
MAX_READ_BYTES = 4 * 2**20
DRAIN_S = 1.2
"""A remote stream that is silent so long after the job's end has given everything."""
GIVE_UP_S = 30.0
"""So long after the job's end, or after the last piece that was stored, its log is tried; then the
job ends with a log that is cut."""
MIN_TRIES = 8
"""So often it is tried in that time at least: the thread may be busy with the logs of others."""
GIVE_UP_HANGING_S = 300.0
"""The same for a storage that takes so long to fail that it is never tried so often."""
GIVE_UP_LOST_S = 2.0
"""The same if the cluster is gone: a file that it left behind is still read."""

log = logging.getLogger(__name__)


class Source(Protocol):
    """Where a log comes from."""

    def read(self) -> bytes:
        """What follows the last `taken`; empty if nothing does now."""

    def taken(self, num_bytes: int) -> None:
        """So many bytes of it are in storage."""

    def at_end(self) -> bool:
        """Whether an ended job's log has been given in full."""

    def close(self) -> None:
        """Give up the connection."""


class FileSource:
    """The log file itself, of a cluster on this machine."""

    def __init__(self, path: Path, offset: int) -> None:
        self._path, self._offset = path, offset

    def read(self) -> bytes:
        """Read on, if the file is there yet."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                return file.read(MAX_READ_BYTES)
        except FileNotFoundError:
            return b""

    def taken(self, num_bytes: int) -> None:
        """Move on."""
        self._offset += num_bytes

    def at_end(self) -> bool:
        """Whether there is no more. False if the file is gone with its cluster."""
        return self._path.exists() and self._path.stat().st_size <= self._offset

    def close(self) -> None:
        """Nothing is held."""


class StreamSource:
    """The cluster's log stream, read by a thread; it begins at 0 each time it is opened."""

    def __init__(self, cluster: ClusterRecord, job: RayJob, offset: int) -> None:
        self._cluster, self._job = cluster, job
        self._skip = offset
        self._chunks: queue.Queue[bytes] = queue.Queue(maxsize=64)  # then the sender waits
        self._held = b""
        self._last_data = time.monotonic()
        self._closed = threading.Event()
        threading.Thread(target=self._receive, daemon=True).start()

    def read(self) -> bytes:
        """What has arrived."""
        while len(self._held) < MAX_READ_BYTES:
            try:
                self._held += self._chunks.get_nowait()
            except queue.Empty:
                break
        return self._held

    def taken(self, num_bytes: int) -> None:
        """Forget what is stored."""
        self._held = self._held[num_bytes:]

    def at_end(self) -> bool:
        """Whether nothing came for a while."""
        silent_s = time.monotonic() - self._last_data
        return not self._held and self._chunks.empty() and silent_s > DRAIN_S

    def close(self) -> None:
        """Let the thread end with its next chunk."""
        self._closed.set()

    def _receive(self) -> None:
        num_received = 0
        while not self._closed.is_set():
            position = 0
            try:
                for data in ray_api.log_stream(self._cluster, self._job, PERIOD_S):
                    known = self._skip + num_received
                    fresh = data[max(0, known - position) :]
                    position += len(data)
                    if fresh:
                        self._last_data = time.monotonic()
                        num_received += len(fresh)
                        self._put(fresh)
                    if self._closed.is_set():
                        return
            except (MantaError, OSError, ValueError):
                self._closed.wait(1.0)  # the agent or the connection; it begins again

    def _put(self, data: bytes) -> None:
        while not self._closed.is_set():
            with contextlib.suppress(queue.Full):
                self._chunks.put(data, timeout=0.5)
                break


@dataclass
class _Shipment:
    """One attempt's log on its way."""

    url: str
    open_source: Callable[[int], Source]
    writer: LogWriter | None = None
    source: Source | None = None
    ended_at: float | None = None
    give_up_s: float = GIVE_UP_S
    moved_at: float = 0.0
    """Monotonic seconds of the last piece that was stored."""
    num_tries: int = 0
    """Since then, and since the job's end."""

    def is_hopeless(self) -> bool:
        """Whether the log of an ended job has been tried in vain for long enough."""
        if self.ended_at is None:
            return False
        waited_s = time.monotonic() - max(self.ended_at, self.moved_at)
        enough = waited_s > self.give_up_s and self.num_tries >= MIN_TRIES
        return enough or waited_s > GIVE_UP_HANGING_S


class Shipper:
    """All shipments of one controller."""

    def __init__(self) -> None:
        self._shipments: dict[str, _Shipment] = {}
        self._results: dict[str, str] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="shipper", daemon=True)

    def start(self) -> None:
        """Begin to ship."""
        self._thread.start()

    def close(self) -> None:
        """Stop shipping; the next controller goes on where this one was."""
        self._stop.set()
        self._thread.join(timeout=5)

    def follow(self, cluster: ClusterRecord, job: RayJob, url: str) -> None:
        """Ship this attempt's log into folder `url`; again is no error."""
        self.follow_source(job.submission_id, url, lambda offset: _open(cluster, job, offset))

    def follow_source(
        self, submission_id: str, url: str, open_source: Callable[[int], Source]
    ) -> None:
        """Ship what `open_source` gives from an offset on; again is no error."""
        with self._lock:
            if submission_id not in self._shipments and submission_id not in self._results:
                self._shipments[submission_id] = _Shipment(url=url, open_source=open_source)

    def finish(self, submission_id: str, *, lost: bool = False) -> str | None:
        """The attempt has ended: `complete` or `cut` once its log is dealt with, else None.

        Args:
            submission_id: of an attempt that is followed.
            lost: the cluster is gone; what it left behind is read, and no more is waited for.
        """
        with self._lock:
            if submission_id in self._results:
                return self._results[submission_id]
            shipment = self._shipments.get(submission_id)
            if shipment is None:
                return "cut" if lost else "complete"
            if shipment.ended_at is None:
                shipment.give_up_s = GIVE_UP_LOST_S if lost else GIVE_UP_S
                shipment.ended_at = time.monotonic()
            return None

    def forget(self, submission_id: str) -> None:
        """The end has been written down."""
        with self._lock:
            self._results.pop(submission_id, None)
            if submission_id in self._shipments:
                self._close(submission_id, "cut")
                self._results.pop(submission_id, None)

    def _run(self) -> None:
        while not self._stop.wait(PERIOD_S):
            with self._lock:
                todo = list(self._shipments.items())
            for submission_id, shipment in todo:
                if self._stop.is_set():
                    return
                self._pump(submission_id, shipment)

    def _pump(self, submission_id: str, shipment: _Shipment) -> None:
        shipment.num_tries += shipment.ended_at is not None
        try:
            finished = self._ship(shipment)
        except (MantaError, OSError) as error:
            log.warning("log of %s: %s", submission_id, error)
            finished = False
        if not finished and not shipment.is_hopeless():
            return
        with self._lock:
            if submission_id in self._shipments:
                self._close(submission_id, "complete" if finished else "cut")

    def _ship(self, shipment: _Shipment) -> bool:
        """Move what there is; returns whether the job's end has been reached."""
        ended = shipment.ended_at is not None  # before reading: what comes later is not missed
        if shipment.writer is None:
            shipment.writer = LogWriter(shipment.url)
        if shipment.source is None:
            shipment.source = shipment.open_source(shipment.writer.num_bytes)
        while data := shipment.source.read():
            shipment.writer.append(data)
            shipment.source.taken(len(data))
            shipment.moved_at, shipment.num_tries = time.monotonic(), 0
            if not ended:
                break  # the others' turn
        return ended and shipment.source.at_end()

    def _close(self, submission_id: str, result: str) -> str:
        shipment = self._shipments.pop(submission_id)
        if shipment.source is not None:
            shipment.source.close()
        self._results[submission_id] = result
        return result


def _open(cluster: ClusterRecord, job: RayJob, offset: int) -> Source:
    logs = Path(cluster.temp_dir, "r", "session_latest", "logs")  # as cluster/local.py has it
    if cluster.is_here and logs.is_dir():
        return FileSource(logs / f"job-driver-{job.submission_id}.log", offset)
    return StreamSource(cluster, job, offset)
