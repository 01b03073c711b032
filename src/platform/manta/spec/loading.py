"""YAML files to frozen pydantic models, with file and line for everything that does not fit."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from manta.errors import Finding, InputError, InvalidSpec

MAX_SPEC_BYTES = 4 * 2**20
MAX_NODES = 100_000  # an alias bomb of 1 kB can name billions of nodes

Path_ = tuple[str | int, ...]
Model = TypeVar("Model", bound="Spec")


class Spec(BaseModel):
    """Base of everything a user writes: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


@dataclass(frozen=True)
class Document:
    """A parsed YAML file: plain values, and the 1-based line of every path into them."""

    file: str
    value: Any
    lines: dict[Path_, int]

    def line(self, path: Path_) -> int | None:
        """The line of `path`, or of its nearest ancestor that the file has."""
        for end in range(len(path), -1, -1):
            if path[:end] in self.lines:
                return self.lines[path[:end]]
        return None


def load(path: str | Path, model: type[Model], overrides: Sequence[str] = ()) -> Model:
    """Read `path` as a `model`; `overrides` are `dotted.key=value` pairs set over the file.

    Raises:
        InvalidSpec: one finding for each thing that is wrong, with its line.
    """
    document = read(path)
    for override in overrides:
        _set(document, override)
    return validate(document, model)


def read(path: str | Path) -> Document:
    """Parse one YAML file. Raises InvalidSpec if it cannot be read or is not one YAML mapping."""
    file = str(path)
    text = _text(file)
    try:
        node = yaml.compose(text, Loader=yaml.CSafeLoader)
        lines: dict[Path_, int] = {}
        value = _construct(node, (), lines, file) if node else None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        raise _invalid(
            file, f"not valid YAML: {error.problem}", line=mark.line + 1 if mark else None
        ) from None
    except (yaml.YAMLError, ValueError) as error:
        raise _invalid(file, f"not valid YAML: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise _invalid(file, "nested too deeply to be a spec") from None
    if not isinstance(value, dict):
        raise _invalid(file, "expected `key: value` lines", line=1, fix="write a YAML mapping")
    return Document(file, value, lines)


def validate(document: Document, model: type[Model]) -> Model:
    """Check `document` against `model`. Raises InvalidSpec with a finding for each fault."""
    try:
        return model.model_validate(document.value)
    except ValidationError as error:
        faults = error.errors(include_url=False)
        raise InvalidSpec(
            _finding(document, model, fault) for fault in faults if not _follows(fault, faults)
        ) from None


def _follows(fault: Any, faults: list[Any]) -> bool:
    """Whether a fault is only the echo of one deeper in the same list ("too short")."""
    loc = fault["loc"]
    return fault["type"] == "too_short" and any(
        other["loc"][: len(loc)] == loc for other in faults if len(other["loc"]) > len(loc)
    )


def _invalid(file: str, what: str, *, line: int | None = None, fix: str = "") -> InvalidSpec:
    return InvalidSpec([Finding(file=file, line=line, what=what, fix=fix)])


def _text(file: str) -> str:
    try:
        data = Path(file).read_bytes()
    except OSError as error:
        raise _invalid(file, f"cannot be read: {error.strerror}") from None
    if len(data) > MAX_SPEC_BYTES:
        raise _invalid(file, f"{len(data):,} bytes; a spec has at most {MAX_SPEC_BYTES:,}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise _invalid(file, "not UTF-8 text", line=line, fix="save the file as UTF-8") from None


_scalars = yaml.CSafeLoader("")


def _construct(node: yaml.Node, path: Path_, lines: dict[Path_, int], file: str) -> Any:
    """The value of `node`, noting each path's line; refuses duplicate keys, which YAML forbids."""
    line = node.start_mark.line + 1
    lines.setdefault(path, line)
    if len(lines) > MAX_NODES:
        raise _invalid(file, f"more than {MAX_NODES:,} values", line=line)
    if isinstance(node, yaml.ScalarNode):
        return _scalars.construct_object(node)
    if isinstance(node, yaml.SequenceNode):
        return [_construct(n, (*path, i), lines, file) for i, n in enumerate(node.value)]
    assert isinstance(node, yaml.MappingNode)
    _scalars.flatten_mapping(node)  # `<<: *base`
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = _key(key_node, file)
        lines[(*path, key)] = key_node.start_mark.line + 1
        result[key] = _construct(value_node, (*path, key), lines, file)
    return result


def _key(node: yaml.Node, file: str) -> str:
    if isinstance(node, yaml.ScalarNode):
        return str(node.value)
    raise _invalid(file, "a key must be plain text", line=node.start_mark.line + 1)


def _set(document: Document, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"--set {override}: expected KEY=VALUE", "e.g. --set num_steps=100")
    *parents, last = key.split(".")
    target = document.value
    for parent in parents:
        target = target.setdefault(parent, {})
        if not isinstance(target, dict):
            raise InputError(f"--set {override}: {parent} is not a mapping in {document.file}")
    target[last] = yaml.safe_load(text)


def _finding(document: Document, model: type[BaseModel], fault: Any) -> Finding:
    loc: Path_ = tuple(fault["loc"])
    key = ".".join(map(str, loc))
    line = document.line(loc)
    if fault["type"] == "extra_forbidden":
        return Finding(
            file=document.file, line=line, what=f"unknown key `{key}`", fix=_nearest(model, loc)
        )
    if fault["type"] == "missing":
        return Finding(
            file=document.file,
            line=line,
            what=f"`{key}` is missing",
            fix=f"add `{loc[-1]}: …`",
        )
    if fault["type"] in ("value_error", "assertion_error"):
        what, _, fix = str(fault["ctx"]["error"]).partition("; ")
        what = f"`{key}`: {what}" if key else what
        return Finding(file=document.file, line=line, what=what, fix=fix)
    given = repr(fault["input"])
    given = given if len(given) <= 60 else given[:57] + "…"
    message = fault["msg"][0].lower() + fault["msg"][1:]
    return Finding(file=document.file, line=line, what=f"`{key}` is {given}", fix=f"{message}")


def _nearest(model: type[BaseModel], loc: Path_) -> str:
    fields = sorted(_fields(model, loc[:-1]))
    close = difflib.get_close_matches(str(loc[-1]), fields, n=1)
    if close:
        return f"did you mean `{close[0]}`?"
    return f"known keys: {', '.join(fields)}" if fields else "remove it"


def _fields(annotation: Any, loc: Path_) -> set[str]:
    """Field names of the models found by walking `loc` through a type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        if not loc:
            return set(annotation.model_fields)
        field = annotation.model_fields.get(str(loc[0]))
        return _fields(field.annotation, loc[1:]) if field else set()
    names: set[str] = set()
    for inner in typing.get_args(annotation):
        deeper = loc[1:] if loc and typing.get_origin(annotation) in (dict, list, tuple) else loc
        names |= _fields(inner, deeper)
    return names
