"""Ray's job API over HTTP, with Manta's errors: the only file that talks to it.

Plain requests and not Ray's client: that takes a second to import, which every command and the
controller's memory would pay for. The API is documented (Ray's openapi.yml of the job server); the
way of packages is what Ray's own client does (dashboard/modules/dashboard_sdk.py).
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import quote

from manta.cluster import credentials
from manta.cluster.record import ClusterRecord
from manta.errors import MantaError
from manta.spec import Resources

SAME_CLOCK_S = 5.0
"""What HTTP's dates, in whole seconds, and a slow answer cannot tell from no difference."""
BROKEN = (OSError, ValueError, http.client.HTTPException)
"""What Python's client raises when there is no answer, or half of one."""
TERMINAL = frozenset({"SUCCEEDED", "FAILED", "STOPPED"})
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy in between


class Unreachable(MantaError):
    """The cluster's API does not answer, or did not in time: whether it acted is unknown."""


class Refused(MantaError):
    """The API answered, with an error.

    Args:
        said: everything it said, tracebacks included.
    """

    def __init__(self, what: str, said: str) -> None:
        self.said = said
        super().__init__(f"{what}: Ray refused it: {_last_line(said)}")


@dataclass(frozen=True, kw_only=True)
class RayJob:
    """What Ray knows of one submission. Times are UTC seconds; None where not reached."""

    submission_id: str
    job_id: str = ""
    """Ray's own of its newest driver that called `ray.init`; empty if none has."""
    status: str
    entrypoint: str
    message: str
    error_type: str
    exit_code: int | None
    node_id: str
    metadata: Mapping[str, str]
    started_at: float | None
    ended_at: float | None

    @property
    def done(self) -> bool:
        """Whether the job has ended, well or not."""
        return self.status in TERMINAL


def submit(
    cluster: ClusterRecord,
    *,
    submission_id: str,
    entrypoint: str,
    runtime_env: Mapping[str, Any],
    metadata: Mapping[str, str],
    resources: Resources,
) -> None:
    """Hand one attempt to Ray. Ray takes a submission id once.

    Raises:
        Unreachable: no answer; Ray may have taken it.
        Refused: it did not take it; `is_duplicate` tells whether the id is taken.
    """
    body = {
        "entrypoint": entrypoint,
        "submission_id": submission_id,
        "runtime_env": dict(runtime_env),
        "metadata": dict(metadata),
        "entrypoint_num_cpus": resources.num_cpus or None,
        "entrypoint_num_gpus": resources.num_gpus or None,
        "entrypoint_memory": resources.memory_bytes or None,
        "entrypoint_resources": resources.custom or None,
    }
    given = {key: value for key, value in body.items() if value is not None}
    _call(cluster, "POST", "/api/jobs/", json.dumps(given).encode(), timeout_s=60)


def is_duplicate(error: Refused) -> bool:
    """Whether a submission was refused because its id is taken."""
    return "already exists" in error.said


def find(cluster: ClusterRecord, submission_id: str) -> RayJob | None:
    """The submission with that id; None if the cluster has none. Raises Unreachable."""
    try:
        return _job(_json(cluster, "GET", f"/api/jobs/{quote(submission_id, safe='')}"))
    except Refused as error:
        if "does not exist" in error.said:
            return None
        raise


def list_all(cluster: ClusterRecord) -> list[RayJob]:
    """All submissions that the cluster remembers, oldest first, with times by our own clock.

    Raises Unreachable.
    """
    body, date = _exchange(cluster, "GET", "/api/jobs/")
    ahead_s = _ahead_s(date)
    jobs = [_job(found, ahead_s) for found in json.loads(body) if found["submission_id"]]
    return sorted(jobs, key=lambda job: job.started_at or float("inf"))


def stop(cluster: ClusterRecord, submission_id: str) -> None:
    """Ask Ray to end the submission; returns at once. It is no error if it has ended."""
    _call(cluster, "POST", f"/api/jobs/{quote(submission_id, safe='')}/stop")


def has_package(cluster: ClusterRecord, name: str) -> bool:
    """Whether the cluster holds package `name`; if so it keeps it for the next minutes."""
    try:
        _call(cluster, "GET", f"/api/packages/gcs/{name}")
    except Refused as error:
        if "does not exist" in error.said:
            return False
        raise
    return True


def put_package(cluster: ClusterRecord, name: str, data: bytes) -> None:
    """Give the cluster the package `name`."""
    _call(cluster, "PUT", f"/api/packages/gcs/{name}", data, timeout_s=300)


def log_text(cluster: ClusterRecord, submission_id: str) -> str:
    """Everything that the submission has written so far."""
    answer = _json(cluster, "GET", f"/api/jobs/{quote(submission_id, safe='')}/logs")
    return str(answer["logs"])


def log_stream(cluster: ClusterRecord, job: RayJob, interval_s: float) -> Iterator[bytes]:
    """The driver's log as raw bytes from its start, and on as it grows, until the caller stops.

    Ray's own tail of a job looks each second, twice, and decodes; this reads the file. Raises
    Unreachable when the connection breaks.
    """
    path = (
        f"/api/v0/logs/stream?node_id={job.node_id}&lines=-1&interval={interval_s:g}"
        f"&filename=job-driver-{quote(job.submission_id, safe='')}.log"
    )
    with _opened(cluster, "GET", path, None, timeout_s=3600) as answer:
        while data := _read_some(cluster, answer):
            yield data


def _read_some(cluster: ClusterRecord, answer: Any) -> bytes:
    try:
        return bytes(answer.read1(2**20))
    except BROKEN as error:
        raise _unreachable(cluster, error) from None


def _json(cluster: ClusterRecord, method: str, path: str) -> Any:
    return json.loads(_call(cluster, method, path))


def _call(
    cluster: ClusterRecord,
    method: str,
    path: str,
    body: bytes | None = None,
    *,
    timeout_s: float = 15,
) -> bytes:
    return _exchange(cluster, method, path, body, timeout_s=timeout_s)[0]


def _exchange(
    cluster: ClusterRecord,
    method: str,
    path: str,
    body: bytes | None = None,
    *,
    timeout_s: float = 15,
) -> tuple[bytes, str]:
    """What was answered, and when by the clock there."""
    try:
        with _opened(cluster, method, path, body, timeout_s) as answer:
            return bytes(answer.read()), answer.headers.get("Date", "")
    except BROKEN as error:
        raise _unreachable(cluster, error) from None


def _opened(
    cluster: ClusterRecord, method: str, path: str, body: bytes | None, timeout_s: float
) -> Any:
    headers = {**credentials.headers(cluster.token_path), "Content-Type": "application/json"}
    request = urllib.request.Request(cluster.dashboard_url + path, body, headers, method=method)
    try:
        return _OPENER.open(request, timeout=timeout_s)
    except urllib.error.HTTPError as error:
        said = error.read().decode(errors="replace")
        raise Refused(f"cluster `{cluster.name}`", said or str(error.reason)) from None
    except BROKEN as error:
        raise _unreachable(cluster, error) from None


def _unreachable(cluster: ClusterRecord, error: Exception) -> Unreachable:
    return Unreachable(
        f"the job API of cluster `{cluster.name}` does not answer ({error})",
        "see `manta status`; start it with `manta up`",
    )


def _ahead_s(date: str) -> float:
    """How far the clock that told `date` is ahead of ours; 0 if it is as right as can be told."""
    try:
        ahead_s = parsedate_to_datetime(date).timestamp() - time.time()
    except ValueError:
        return 0.0
    return ahead_s if abs(ahead_s) > SAME_CLOCK_S else 0.0


def _job(details: Mapping[str, Any], ahead_s: float = 0.0) -> RayJob:
    started, ended = details["start_time"], details["end_time"]
    return RayJob(
        submission_id=details["submission_id"] or "",
        job_id=details.get("job_id") or "",
        status=details["status"],
        entrypoint=details["entrypoint"],
        message=details["message"] or "",
        error_type=details["error_type"] or "",
        exit_code=details["driver_exit_code"],
        node_id=details["driver_node_id"] or "",
        metadata=details["metadata"] or {},
        started_at=started / 1000 - ahead_s if started else None,
        ended_at=ended / 1000 - ahead_s if ended else None,
    )


def _last_line(text: str) -> str:
    lines = [line for line in text.replace("\\n", "\n").splitlines() if line.strip(" \"'}.")]
    return lines[-1].strip() if lines else text
