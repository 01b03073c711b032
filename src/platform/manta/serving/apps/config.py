"""Ray Serve config files, read with file and line for everything that is wrong with them."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from manta import spec
from manta.errors import Finding, InvalidSpec

Path_ = tuple[str | int, ...]


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """A native Serve config that Ray's own schema accepts, without unknown keys."""

    file: str
    applications_passthrough: tuple[dict[str, Any], ...]
    """Ray's application entries, as they stand in the file."""
    http_host: str | None = None
    """None where the file leaves it open."""
    http_port: int | None = None
    options_passthrough: dict[str, Any]
    """Ray's other top-level keys, e.g. proxy_location, logging_config."""


def read(file: str) -> ServeConfig:
    """Read a Serve config. Raises InvalidSpec with a finding for each thing that is wrong."""
    from ray.serve.schema import ServeDeploySchema

    document = spec.read(file)
    findings = list(_unknown_keys(document, ServeDeploySchema, document.value, ()))
    if findings:
        raise InvalidSpec(findings)
    spec.validate(document, ServeDeploySchema)
    options = dict(document.value)
    http = options.pop("http_options", None) or {}
    return ServeConfig(
        file=file,
        applications_passthrough=tuple(options.pop("applications")),
        http_host=http.get("host"),
        http_port=http.get("port"),
        options_passthrough={
            **options,
            "http_options": {k: v for k, v in http.items() if k not in ("host", "port")},
        },
    )


def _unknown_keys(
    document: spec.Document, annotation: Any, value: Any, path: Path_
) -> Iterator[Finding]:
    """Ray's schemas let unknown keys pass; a misspelt one would silently have no effect."""
    model = _model(annotation)
    if model is not None and isinstance(value, dict):
        for key, inner in value.items():
            if key in model.model_fields:
                field = model.model_fields[key].annotation
                yield from _unknown_keys(document, field, inner, (*path, key))
            else:
                yield _unknown(document, (*path, key), sorted(model.model_fields))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            for item in _list_items(annotation):
                yield from _unknown_keys(document, item, inner, (*path, number))


def _unknown(document: spec.Document, path: Path_, known: list[str]) -> Finding:
    close = difflib.get_close_matches(str(path[-1]), known, n=1)
    return Finding(
        file=document.file,
        line=document.line(path),
        what=f"unknown key `{'.'.join(map(str, path))}`",
        fix=f"did you mean `{close[0]}`?" if close else f"known keys: {', '.join(known)}",
    )


def _model(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (list, dict, tuple):
        return None
    models = [_model(inner) for inner in typing.get_args(annotation)]
    found = [model for model in models if model is not None]
    return found[0] if len(found) == 1 else None


def _list_items(annotation: Any) -> list[Any]:
    if typing.get_origin(annotation) is list:
        return list(typing.get_args(annotation))
    return [item for inner in typing.get_args(annotation) for item in _list_items(inner)]
