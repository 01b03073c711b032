"""A job API that answers as Ray's does and misbehaves when told to: tests without a cluster."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from manta.cluster import record
from manta.cluster.record import ClusterRecord


class FakeRay:
    """One cluster. `jobs` is its job table; a job ends when a test says so."""

    def __init__(self, folder: Path, cluster_id: str = "c1", name: str = "local") -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.posts: Counter[str] = Counter()
        self.stopped: list[str] = []
        self.misbehave: list[str] = []
        """What happens to the next submissions: `drop` (accepted, no answer), `cut` (half of one),
        `lose` (neither), `no agent` (refused for now)."""
        self.ahead_s = 0.0
        """How far its clock is ahead of ours."""
        self.logs = folder / "r" / "session_latest" / "logs"
        self.logs.mkdir(parents=True)
        token = folder / "token"
        token.write_text("secret")
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                fake.get(self)

            def do_POST(self) -> None:
                fake.post(self)

            def date_time_string(self, timestamp: float | None = None) -> str:
                return super().date_time_string(fake.now())

            def log_message(self, *arguments: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.record = ClusterRecord(
            name=name,
            cluster_id=cluster_id,
            pid=0,
            gcs_address="",
            dashboard_url=f"http://127.0.0.1:{self.server.server_port}",
            serve_url="",
            token_path=str(token),
            temp_dir=str(folder),
            storage_url=str(folder / "storage"),
            started_at="2026-01-01T00:00:00+00:00",
        )
        record.save(self.record)

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def end(self, submission_id: str, status: str = "SUCCEEDED", **facts: Any) -> None:
        self.jobs[submission_id] |= {"status": status, "end_time": self._ms(), **facts}

    def get(self, request: BaseHTTPRequestHandler) -> None:
        path = request.path.partition("?")[0]
        if path == "/api/jobs/":
            return _answer(request, 200, list(self.jobs.values()))
        if path == "/api/v0/nodes":
            total = {"CPU": 4.0, "node:127.0.0.1": 1.0}
            node = {"node_id": "n", "node_ip": "127.0.0.1", "state": "ALIVE"}
            node |= {"is_head_node": True, "resources_total": total}
            return _answer(request, 200, {"data": {"result": {"result": [node]}}})
        return _answer(request, 404, "nothing here")

    def post(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        if request.path.endswith("/stop"):
            submission_id = request.path.split("/")[-2]
            self.stopped.append(submission_id)
            self.end(submission_id, "STOPPED")
            return _answer(request, 200, {"stopped": True})
        job = json.loads(body)
        submission_id = job["submission_id"]
        self.posts[submission_id] += 1
        how = self.misbehave.pop(0) if self.misbehave else ""
        if how == "no agent":
            return _answer(
                request, 500, "No available agent to submit job, please try again later."
            )
        if how == "lose":
            return request.connection.close()
        if submission_id in self.jobs:
            said = f"ValueError: Job with submission_id {submission_id} already exists."
            return _answer(request, 400, said)
        self.start(submission_id, job)
        if how == "cut":
            request.send_response(200)
            request.send_header("Content-Length", "1000")
            request.end_headers()
            request.wfile.write(b'{"submission')
            return request.connection.close()
        if how == "drop":
            return request.connection.close()
        return _answer(request, 200, {"submission_id": submission_id})

    def start(self, submission_id: str, job: dict[str, Any]) -> None:
        """A driver begins to run."""
        (self.logs / f"job-driver-{submission_id}.log").write_text(f"log of {submission_id}\n")
        self.jobs[submission_id] = {
            "submission_id": submission_id,
            "status": "RUNNING",
            "entrypoint": job["entrypoint"],
            "message": "",
            "error_type": None,
            "driver_exit_code": None,
            "driver_node_id": "n",
            "metadata": job.get("metadata", {}),
            "start_time": self._ms(),
            "end_time": None,
        }

    def now(self) -> float:
        """UTC seconds by its clock."""
        return time.time() + self.ahead_s

    def _ms(self) -> int:
        return int(self.now() * 1000)


def _answer(request: BaseHTTPRequestHandler, status: int, value: object) -> None:
    text = value if isinstance(value, str) else json.dumps(value)
    request.send_response(status)
    request.send_header("Content-Length", str(len(text)))
    request.end_headers()
    request.wfile.write(text.encode())
