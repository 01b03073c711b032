"""Asks an application the questions of a quality check, over HTTP, as a client would."""

from __future__ import annotations

import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from manta.spec.probes import Probe

# The endpoint is the cluster's own; a proxy from the environment has no business in between.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_SHOWN_CHARS = 120


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where an application answers, and with which key."""

    url: str
    key: str | None = None


def failures(endpoint: Endpoint, probes: Sequence[Probe]) -> list[str]:
    """One line for each probe whose answer is not as it must be; empty if all are."""
    model = _first_model(endpoint) if any(_needs_model(probe) for probe in probes) else ""
    found = []
    for probe in probes:
        started = time.monotonic()
        status, text = _ask(endpoint, probe, model)
        fault = _fault(probe, status, text, time.monotonic() - started)
        if fault:
            found.append(f"{_name(probe)}: {fault}")
    return found


def _needs_model(probe: Probe) -> bool:
    return probe.path is None and probe.model is None


def _first_model(endpoint: Endpoint) -> str:
    status, text = _request(endpoint, "/v1/models", None, timeout_s=30)
    try:
        return str(json.loads(text)["data"][0]["id"])
    except (ValueError, LookupError, TypeError):
        return f"(no model: /v1/models answered {status})"


def _ask(endpoint: Endpoint, probe: Probe, model: str) -> tuple[int, str]:
    """HTTP status, 0 if there was no answer, and the text that is looked at."""
    timeout_s = probe.max_latency_s + 5  # a late answer is told from none
    if probe.path is not None:
        return _request(endpoint, probe.path, probe.body, timeout_s)
    body: dict[str, Any] = {
        "model": probe.model or model,
        "max_tokens": probe.max_tokens,
        "temperature": 0,
    }
    if probe.prompt is not None:
        status, text = _request(
            endpoint, "/v1/completions", {**body, "prompt": probe.prompt}, timeout_s
        )
    else:
        status, text = _request(
            endpoint, "/v1/chat/completions", {**body, "messages": probe.messages}, timeout_s
        )
    return status, _said(text) if status == 200 else text


def _said(text: str) -> str:
    try:
        choice = json.loads(text)["choices"][0]
        return str(choice["text"] if "text" in choice else choice["message"]["content"])
    except (ValueError, LookupError, TypeError):
        return text


def _request(endpoint: Endpoint, path: str, body: Any, timeout_s: float) -> tuple[int, str]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(endpoint.url.rstrip("/") + path, data)
    request.add_header("Content-Type", "application/json")
    if endpoint.key:
        request.add_header("Authorization", f"Bearer {endpoint.key}")
    try:
        with _OPENER.open(request, timeout=timeout_s) as answer:
            return answer.status, answer.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(errors="replace")
    except OSError as error:
        return 0, str(error)


def _fault(probe: Probe, status: int, text: str, latency_s: float) -> str | None:
    if status != probe.status:
        return f"HTTP {status} and not {probe.status}: {_shown(text)}"
    if latency_s > probe.max_latency_s:
        return f"took {latency_s:.2f} s, over {probe.max_latency_s:g} s"
    if probe.contains is not None and probe.contains not in text:
        return f"does not contain {probe.contains!r}: {_shown(text)}"
    if probe.lacks is not None and probe.lacks in text:
        return f"contains {probe.lacks!r}: {_shown(text)}"
    if probe.matches is not None and not re.search(probe.matches, text):
        return f"does not match {probe.matches!r}: {_shown(text)}"
    return _schema_fault(probe.json_schema, text) if probe.json_schema is not None else None


def _schema_fault(schema: dict[str, Any], text: str) -> str | None:
    import jsonschema  # type: ignore[import-untyped]

    try:
        jsonschema.validate(json.loads(text), schema, jsonschema.Draft202012Validator)
    except ValueError:
        return f"is not JSON: {_shown(text)}"
    except jsonschema.ValidationError as error:
        return f"does not fit the schema: {_shown(error.message)}"
    return None


def _name(probe: Probe) -> str:
    asked = probe.path or probe.prompt or str((probe.messages or [{}])[-1].get("content", ""))
    return _shown(asked)


def _shown(text: str) -> str:
    short = text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "…"
    return repr(short)
