"""A quality check of an application: questions, and what must be true of the answers.

One JSON object a line. `manta deploy --check FILE` asks them before a new version gets traffic.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator, model_validator

from manta.errors import Finding, InputError, InvalidSpec
from manta.spec.loading import Spec


class Probe(Spec):
    """One question; give one of `prompt`, `messages` and `path`."""

    prompt: str | None = None
    """Completed by the model."""
    messages: list[dict[str, Any]] | None = None
    """A chat that the model answers."""
    path: str | None = Field(None, pattern="^/")
    """Below the application's route, for applications that are no language models."""
    body: Any = None
    """JSON that is sent to `path` with POST; without it, GET."""
    model: str | None = None
    """None is the only, or the first, model of the application."""
    max_tokens: int = Field(64, ge=1)
    app: str | None = None
    """Only this application of the file is asked; None asks each."""

    contains: str | None = None
    lacks: str | None = None
    matches: str | None = None
    """A regular expression that is found somewhere in the answer."""
    json_schema: dict[str, Any] | None = None
    """The answer is JSON and fits it."""
    status: int = 200
    max_latency_s: float = Field(60, gt=0)
    """From the request to the answer's last byte."""

    @field_validator("matches")
    @classmethod
    def _is_pattern(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        return value

    @field_validator("json_schema")
    @classmethod
    def _is_schema(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        import jsonschema  # type: ignore[import-untyped]

        try:
            jsonschema.Draft202012Validator.check_schema(value or {})
        except jsonschema.SchemaError as error:
            raise ValueError(f"not a JSON schema: {error.message}") from None
        return value

    @model_validator(mode="after")
    def _asks_one_thing(self) -> Probe:
        if sum(asked is not None for asked in (self.prompt, self.messages, self.path)) != 1:
            raise ValueError("give one of prompt, messages and path")
        return self


def read_probes(file: str) -> tuple[Probe, ...]:
    """Read a JSONL file of probes.

    Raises:
        InputError: it cannot be read or is empty.
        InvalidSpec: one finding for each line that does not hold.
    """
    try:
        lines = Path(file).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise InputError(f"{file}: cannot be read: {reason}") from None
    probes, findings = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            probes.append(Probe.model_validate(json.loads(line)))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            what = f"`{where}`: {first['msg']}" if where else first["msg"]
            findings.append(Finding(file=file, line=number, what=what))
        except ValueError:
            what = "not JSON"
            findings.append(Finding(file=file, line=number, what=what, fix="one object a line"))
    if findings:
        raise InvalidSpec(findings)
    if not probes:
        raise InputError(f"{file}: asks nothing", 'e.g. {"prompt": "2 + 2 =", "contains": "4"}')
    return tuple(probes)
