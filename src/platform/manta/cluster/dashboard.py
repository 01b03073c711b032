"""The dashboard's HTTP API with the cluster's token, without importing Ray."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manta.cluster.credentials import read_token
from manta.cluster.record import ClusterRecord
from manta.errors import MantaError

# The cluster is on this machine; a proxy from the environment has no business in between.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def get(cluster: ClusterRecord, path: str, timeout_s: float = 10) -> Any:
    """GET `path` as JSON. Raises MantaError if the cluster does not answer or refuses."""
    return _request(cluster, "GET", path, None, timeout_s)


def put(cluster: ClusterRecord, path: str, body: object, timeout_s: float = 60) -> Any:
    """PUT `body` as JSON. Raises MantaError if the cluster does not answer or refuses."""
    return _request(cluster, "PUT", path, json.dumps(body).encode(), timeout_s)


@dataclass(frozen=True, kw_only=True)
class RunningJob:
    """A job that has not ended."""

    id: str
    status: str
    entrypoint: str
    age_s: float


def running_jobs(cluster: ClusterRecord) -> list[RunningJob]:
    """Jobs that have not ended, oldest first. Raises MantaError if the cluster is silent."""
    now_s = time.time()
    found = [
        RunningJob(
            id=job["submission_id"] or job["job_id"],
            status=job["status"],
            entrypoint=job["entrypoint"],
            age_s=now_s - job["start_time"] / 1000,
        )
        for job in get(cluster, "/api/jobs/")
        if job["status"] in ("PENDING", "RUNNING")
    ]
    return sorted(found, key=lambda job: -job.age_s)


def is_up(url: str, token_path: str, timeout_s: float = 5) -> bool:
    """Whether a GET with the token gives 200 within `timeout_s`."""
    try:
        with _OPENER.open(_authenticated(url, token_path), timeout=timeout_s) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _request(
    cluster: ClusterRecord, method: str, path: str, body: bytes | None, timeout_s: float
) -> Any:
    request = _authenticated(cluster.dashboard_url + path, cluster.token_path)
    request.method, request.data = method, body
    request.add_header("Content-Type", "application/json")
    try:
        with _OPENER.open(request, timeout=timeout_s) as answer:
            text = answer.read()
    except urllib.error.HTTPError as error:
        reason = error.read().decode(errors="replace").strip().splitlines()
        said = reason[-1] if reason else error.reason
        raise MantaError(f"cluster `{cluster.name}` refused {path}: {said}") from None
    except OSError as error:
        raise MantaError(
            f"cluster `{cluster.name}` does not answer at {cluster.dashboard_url} ({error})",
            "see `manta status`, or start afresh with `manta down` and `manta up`",
        ) from None
    return json.loads(text) if text else None


def _authenticated(url: str, token_path: str) -> urllib.request.Request:
    token = read_token(Path(token_path))
    return urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
