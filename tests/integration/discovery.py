"""Hold a call to Google's own description of its API, a discovery document."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any


def faults(document: dict[str, Any], method: str, arguments: dict[str, Any]) -> Iterator[str]:
    """What Google's client or API would not know in a call of `service.resource….verb`."""
    _, *resources, verb = method.split(".")
    where = document
    for name in resources:
        where = where["resources"][name]
    if verb not in where["methods"]:
        yield f"{method}: no such method"
        return
    described = where["methods"][verb]
    given = {name: value for name, value in arguments.items() if value is not None}
    body = given.pop("body", None)
    yield from (
        f"{method}: {fault}" for fault in _parameters(described.get("parameters", {}), given)
    )
    if body is not None:
        yield from _body(document["schemas"], described["request"], body, method)


def _parameters(known: dict[str, Any], given: dict[str, Any]) -> Iterator[str]:
    for name, value in given.items():
        if name not in known:
            yield f"no parameter {name}"
        elif not re.match(known[name].get("pattern", ""), value):
            yield f"{name}: {value} does not match {known[name]['pattern']}"
    yield from (
        f"{n} is missing" for n, p in known.items() if p.get("required") and n not in given
    )


def _body(schemas: dict[str, Any], schema: dict[str, Any], value: Any, at: str) -> Iterator[str]:
    schema = schemas[schema["$ref"]] if "$ref" in schema else schema
    if isinstance(value, list):
        for item in value:
            yield from _body(schemas, schema["items"], item, at)
    elif isinstance(value, dict) and "properties" in schema:  # else free, as labels are
        for key, item in value.items():
            if key in schema["properties"]:
                yield from _body(schemas, schema["properties"][key], item, f"{at}.{key}")
            else:
                yield f"{at}: no field {key}"
    elif "enum" in schema and value not in schema["enum"]:
        yield f"{at}: no value {value}"
