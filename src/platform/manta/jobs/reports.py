"""What a job says of itself when it is done: a JSON file in storage that its variable names.

    {"artifacts": {"model": "s3://…"}, "metrics": {"loss": 1.9}}

The scripts in `jobs/` write it; a script of the user's own may.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from manta import storage
from manta.errors import InputError
from manta.jobs.model import JobRequest

VARIABLE = "MANTA_REPORT"
MAX_BYTES = 2**20
"""Of a report; the controller reads it into memory."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Of a job that has written one."""

    artifacts: Mapping[str, str] = field(default_factory=dict)
    """What it made: name → URL."""
    metrics: Mapping[str, float | str] = field(default_factory=dict)


def place(storage_url: str, job_id: str) -> str:
    """Where a job that is no step of a run writes it."""
    return storage.join(storage_url, "jobs", job_id, "report.json")


def with_place(runtime_env: Mapping[str, Any], url: str) -> dict[str, Any]:
    """The runtime_env with the variable, unless the user has set it.

    Raises InputError if its env_vars are no map.
    """
    variables = runtime_env.get("env_vars") or {}
    if not isinstance(variables, Mapping):
        raise InputError("runtime_env.env_vars is no map", 'write e.g. {"NAME": "value"}')
    return {**runtime_env, "env_vars": {VARIABLE: url, **variables}}


def under(job: JobRequest, job_id: str) -> JobRequest:
    """The same job under another id, with a report of its own."""
    runtime_env = job.runtime_env_passthrough
    if url_of(job) == place(job.storage_url, job.id):
        own = {**runtime_env["env_vars"], VARIABLE: place(job.storage_url, job_id)}
        runtime_env = {**runtime_env, "env_vars": own}
    return job.model_copy(update={"id": job_id, "runtime_env_passthrough": runtime_env})


def url_of(job: JobRequest) -> str:
    """Where the job writes it; empty if that is not under its storage root: nobody reads it then.

    Whoever submits may name any place, and the controller must not open what they cannot.
    """
    variables = job.runtime_env_passthrough.get("env_vars") or {}
    url = str(variables.get(VARIABLE, "")) if isinstance(variables, Mapping) else ""
    is_inside = url.startswith(storage.join(job.storage_url, "")) and ".." not in url.split("/")
    return url if is_inside else ""


def make_place(url: str) -> None:
    """See that a shell script can write it with `>`."""
    if url and storage.is_local(url):
        _, path = storage.filesystem(url)
        Path(path).parent.mkdir(parents=True, exist_ok=True)


def read(url: str) -> Report:
    """The report; an empty one if there is none. Raises InputError if it is not as above."""
    if not url or not storage.exists(url):
        return Report()
    told = storage.read_json(url, MAX_BYTES)
    artifacts, metrics = _part(told, "artifacts", url), _part(told, "metrics", url)
    return Report(
        artifacts={str(name): str(value) for name, value in artifacts.items()},
        metrics={
            str(name): value if isinstance(value, int | float) else str(value)
            for name, value in metrics.items()
        },
    )


def _part(told: Any, name: str, url: str) -> Mapping[str, Any]:
    found = told.get(name, {}) if isinstance(told, dict) else None
    if not isinstance(found, dict):
        raise InputError(f"{url} has no `{name}`", f'write {{"{name}": {{"NAME": …}}}} there')
    return found
