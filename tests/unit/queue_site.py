"""A state, a controller and a cluster for the tests of the controller."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fake_ray import FakeRay
from queue_state import request

from manta import state as states
from manta.jobs import lease, queries, store
from manta.jobs.controller import Controller, Options
from manta.jobs.model import Job, JobState
from manta.state import State


class Site:
    """A state, a controller that can be killed and replaced, and a cluster."""

    def __init__(self, tmp_path: Path) -> None:
        self.state: State = states.open_state(f"sqlite:///{tmp_path}/state.db")
        self.ray = FakeRay(tmp_path / "cluster")
        self.storage_url = str(tmp_path / "storage")
        self.options = Options()
        self._controller: Controller | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        held = lease.acquire(self.state)
        assert held is not None
        self._controller = Controller(self.state, held, self.options)
        self._thread = threading.Thread(target=self._controller.run)
        self._thread.start()
        self._held = held

    def stop(self) -> None:
        if self._controller and self._thread:
            self._controller.stop()
            self._thread.join(timeout=20)
            assert not self._thread.is_alive()
            self._held.release(self.state)
        self._controller = self._thread = None

    def submit(self, job_id: str, **changes: Any) -> None:
        asked = {"retry": {"backoff_s": 0.05}, "storage_url": self.storage_url}
        store.submit(self.state, request(job_id, **(asked | changes)), "test")

    def job(self, job_id: str) -> Job:
        return queries.get(self.state, job_id)

    def until(self, check: Callable[[], Any], what: str) -> None:
        deadline = time.monotonic() + 20
        while not check():
            assert time.monotonic() < deadline, what
            time.sleep(0.02)

    def until_state(self, job_id: str, *wanted: JobState) -> Job:
        self.until(lambda: self.job(job_id).state in wanted, f"{job_id} is {self.job(job_id)}")
        return self.job(job_id)

    def runs(self, submission_id: str) -> None:
        self.until(lambda: submission_id in self.ray.jobs, f"{submission_id} runs")
