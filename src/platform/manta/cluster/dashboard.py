"""The dashboard's HTTP API with the cluster's token, without importing Ray."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from manta.cluster import credentials
from manta.cluster.record import ClusterRecord
from manta.errors import MantaError

# The cluster is on this machine; a proxy from the environment has no business in between.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def get(cluster: ClusterRecord, path: str, timeout_s: float = 10) -> Any:
    """GET `path` as JSON. Raises MantaError if the cluster does not answer or refuses."""
    return _json(_request(cluster, "GET", path, None, timeout_s))


def get_text(cluster: ClusterRecord, path: str, timeout_s: float = 10) -> str:
    """GET `path` as text, e.g. a log. Raises MantaError as `get` does."""
    return _request(cluster, "GET", path, None, timeout_s).decode(errors="replace")


def put(cluster: ClusterRecord, path: str, body: object, timeout_s: float = 60) -> Any:
    """PUT `body` as JSON. Raises MantaError if the cluster does not answer or refuses."""
    return _json(_request(cluster, "PUT", path, json.dumps(body).encode(), timeout_s))


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


@dataclass(frozen=True, kw_only=True)
class Node:
    """A machine of the cluster. Resources are in Ray's units: bytes for the memories."""

    id: str
    address: str
    state: str
    is_head: bool
    total: dict[str, float]
    node_type: str = ""
    """Of the cluster YAML; empty on a cluster that Ray's launcher did not start."""
    started_at: float | None = None
    """UTC seconds by the head's clock, as is `ended_at`: when Ray started and ended there."""
    ended_at: float | None = None


def nodes(cluster: ClusterRecord) -> list[Node]:
    """Nodes that the cluster knows, dead ones too. Raises MantaError if it is silent."""
    answer = get(cluster, "/api/v0/nodes?limit=10000&detail=true")
    return [
        Node(
            id=node["node_id"],
            address=node["node_ip"],
            state=node["state"],
            is_head=node["is_head_node"],
            total=_countable(node["resources_total"]),
            node_type=(node.get("labels") or {}).get("ray.io/node-group", ""),
            started_at=_seconds(node.get("start_time_ms")),
            ended_at=_seconds(node.get("end_time_ms")),
        )
        for node in answer["data"]["result"]["result"]
    ]


def _seconds(milliseconds: int | None) -> float | None:
    return milliseconds / 1000 if milliseconds else None


def used_resources(cluster: ClusterRecord) -> dict[str, float]:
    """Resources in use over all nodes, at most some seconds old; empty until first reported."""
    status = get(cluster, "/api/cluster_status")["data"]["clusterStatus"] or {}
    report = status.get("loadMetricsReport") or {}
    used = {name: used for name, (used, _) in (report.get("usage") or {}).items()}
    # The dashboard turns names into camel case on the way.
    return _countable({"object_store_memory" if "Store" in n else n: u for n, u in used.items()})


def autoscaler_text(cluster: ClusterRecord) -> str:
    """The autoscaler's report as `ray status` prints it; v2 gives it in no other form."""
    answer = get(cluster, "/api/cluster_status?format=1")
    return str((answer["data"] or {}).get("clusterStatus") or "")


def autoscaler_events(cluster: ClusterRecord) -> list[str]:
    """What the autoscaler did, oldest first: time (UTC) and words; of repeats the last."""
    # Not /api/v0/cluster_events: it fails now and then while events come in.
    jobs: dict[str, list[dict[str, Any]]] = get(cluster, "/events")["data"]["events"]
    events = sorted(
        (float(event["timestamp"]), event["message"])
        for event in (event for job in jobs.values() for event in job)
        if event.get("sourceType") == "AUTOSCALER" and event.get("severity") != "DEBUG"
    )
    last = {message: at_s for at_s, message in events}
    return [
        f"{datetime.fromtimestamp(at_s, UTC):%Y-%m-%d %H:%M:%S} {message}"
        for message, at_s in sorted(last.items(), key=lambda item: item[1])
    ]


@dataclass(frozen=True, kw_only=True)
class Application:
    """A Serve application."""

    name: str
    state: str
    route_prefix: str | None
    age_s: float


def applications(cluster: ClusterRecord) -> list[Application]:
    """Serve applications by name. Raises MantaError if the cluster is silent."""
    found: dict[str, Any] = get(cluster, "/api/serve/applications/")["applications"]
    return [
        Application(
            name=name,
            state=app["status"],
            route_prefix=app["route_prefix"],
            age_s=time.time() - app["last_deployed_time_s"],
        )
        for name, app in sorted(found.items())
    ]


def log_files(cluster: ClusterRecord, node_id: str) -> list[str]:
    """Names of the log files of a node's Ray session. Raises MantaError if it cannot be asked."""
    answer = get(cluster, f"/api/v0/logs?node_id={node_id}&glob=*", timeout_s=60)
    kinds: dict[str, list[str]] = answer["data"]["result"]
    return sorted({name for names in kinds.values() for name in names if name[-1:] != "/"})


def save_log(cluster: ClusterRecord, node_id: str, name: str, path: Path) -> None:
    """Write a whole log file of a node to `path`. Raises MantaError as `get` does."""
    query = urllib.parse.urlencode({"node_id": node_id, "filename": name, "lines": -1})
    text = _request(cluster, "GET", f"/api/v0/logs/file?{query}", None, 120)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text)


def _countable(resources: dict[str, float]) -> dict[str, float]:
    """Without the `node:…` markers, which Ray uses to place work and not to count."""
    return {name: n for name, n in sorted(resources.items()) if not name.startswith("node:")}


def is_up(url: str, token_path: str, timeout_s: float = 5) -> bool:
    """Whether a GET with the token gives 200 within `timeout_s`."""
    try:
        with _OPENER.open(_authenticated(url, token_path), timeout=timeout_s) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _request(
    cluster: ClusterRecord, method: str, path: str, body: bytes | None, timeout_s: float
) -> bytes:
    request = _authenticated(cluster.dashboard_url + path, cluster.token_path)
    request.method, request.data = method, body
    request.add_header("Content-Type", "application/json")
    try:
        with _OPENER.open(request, timeout=timeout_s) as answer:
            return bytes(answer.read())
    except urllib.error.HTTPError as error:
        reason = error.read().decode(errors="replace").strip().splitlines()
        said = reason[-1] if reason else error.reason
        raise MantaError(f"cluster `{cluster.name}` refused {path}: {said}") from None
    except OSError as error:
        raise MantaError(
            f"cluster `{cluster.name}` does not answer at {cluster.dashboard_url} ({error})",
            "see `manta status`, or start afresh with `manta down` and `manta up`",
        ) from None


def _json(text: bytes) -> Any:
    return json.loads(text) if text else None


def _authenticated(url: str, token_path: str) -> urllib.request.Request:
    return urllib.request.Request(url, headers=credentials.headers(token_path))
