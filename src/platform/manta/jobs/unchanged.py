"""Steps that need not run again: same code, config and steps before, and the result still there.

A step is known by a hash of all that; what it made is known by hashes of its content. What a step
reads from elsewhere (a table, a website) is not seen: run without `--skip-unchanged` then.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from manta import storage
from manta.errors import InputError
from manta.jobs import reports
from manta.jobs.model import JobRequest
from manta.workloads import layout

MESSAGE = "unchanged"
"""Of a step that was taken from an earlier run."""


@dataclass(frozen=True, kw_only=True)
class Earlier:
    """An earlier run of the same step."""

    job_id: str
    artifacts: Mapping[str, str]


def fingerprint(request: JobRequest, before: Mapping[str, str]) -> str:
    """Hash of what the step will do; `before` has the fingerprints of the steps that it needs."""
    runtime_env = dict(request.runtime_env_passthrough)
    variables = dict(runtime_env.pop("env_vars", None) or {})
    variables.pop(reports.VARIABLE, None)  # a file of the run; no part of what the step does
    told = {
        "entrypoint": request.entrypoint,
        "runtime_env": runtime_env,
        "environment": variables,
        "resources": request.resources.model_dump(),
        "before": dict(before),
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def find(mark: str, root: str) -> Earlier | None:
    """The earlier run, if all that it made is still what it was; `root` is the storage's."""
    if not storage.exists(_place(mark, root)):
        return None
    told: dict[str, Any] = storage.read_json(_place(mark, root))
    for name, url in told["artifacts"].items():
        if not told["content"][name] or _content(url) != told["content"][name]:
            return None
    return Earlier(job_id=told["job_id"], artifacts=told["artifacts"])


def remember(mark: str, job_id: str, artifacts: Mapping[str, str], root: str) -> None:
    """Keep what a step that succeeded has made, unless something of it cannot be read here."""
    content = {name: _content(url) for name, url in artifacts.items()}
    if not all(content.values()):
        return
    told = {"job_id": job_id, "artifacts": dict(artifacts), "content": content}
    storage.write_json(_place(mark, root), told)


def _content(url: str) -> str:
    """Hash of an artifact; empty if it is not there. Models without their scores and cards."""
    try:
        seal = storage.join(url, storage.SEAL)
        if storage.exists(seal):
            return layout.model_content(storage.read_seal(url, url))
        sizes = storage.file_sizes(url)
        files = {name.removeprefix(url): storage.fingerprint_file(name) for name in sizes}
    except InputError:
        return ""  # damaged, half written, or no URL of a file at all
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest() if files else ""


def _place(mark: str, root: str) -> str:
    return storage.join(root, "steps", f"{mark}.json")
