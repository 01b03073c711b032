"""YAML files to frozen pydantic models, with file and line for everything that does not fit."""

from __future__ import annotations

import difflib
import os
import stat
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from manta.errors import Finding, InputError, InvalidSpec

MAX_SPEC_BYTES = 4 * 2**20
MAX_NODES = 60_000  # an alias bomb of 1 kB can name billions of nodes
MAX_DEPTH = 100
MAX_FAULTS = 100  # of one file; more help nobody and take time to word

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
    """Parse one YAML file. Raises InvalidSpec if it cannot be read or is not one YAML mapping.

    Safe for hostile files: bounded in size, depth and number of values before anything recurses.
    """
    file = str(path)
    text = _text(file)
    try:
        _bound(text, file)
        node = yaml.compose(text, Loader=yaml.CSafeLoader)
        builder = _Builder(file)
        value = builder.build(node, ()) if node else None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        raise _invalid(
            file,
            f"not valid YAML: {error.problem}",
            line=mark.line + 1 if mark else None,
            rule="not-yaml",
        ) from None
    except (yaml.YAMLError, ValueError) as error:
        what = f"not valid YAML: {str(error).splitlines()[0]}"
        raise _invalid(file, what, rule="not-yaml") from None
    if not isinstance(value, dict):
        raise _invalid(
            file,
            "expected `key: value` lines",
            line=1,
            fix="write a YAML mapping",
            rule="not-yaml",
        )
    return Document(file, value, builder.lines)


def validate(document: Document, model: type[Model]) -> Model:
    """Check `document` against `model`. Raises InvalidSpec with a finding for each fault."""
    try:
        return model.model_validate(document.value)
    except ValidationError as error:
        faults = error.errors(include_url=False)
        faults.sort(key=lambda fault: fault["type"] == "extra_forbidden")  # a flood goes last
        faults = faults[:MAX_FAULTS]
        raise InvalidSpec(
            _finding(document, model, fault) for fault in faults if not _follows(fault, faults)
        ) from None


def _follows(fault: Any, faults: list[Any]) -> bool:
    """Whether a fault is only the echo of one deeper in the same list ("too short")."""
    loc = fault["loc"]
    return fault["type"] == "too_short" and any(
        other["loc"][: len(loc)] == loc for other in faults if len(other["loc"]) > len(loc)
    )


def _invalid(
    file: str, what: str, *, line: int | None = None, fix: str = "", rule: str = "unreadable"
) -> InvalidSpec:
    return InvalidSpec([Finding(file=file, line=line, what=what, fix=fix, rule=rule)])


def _text(file: str) -> str:
    try:
        with Path(file).open("rb") as stream:
            if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                raise _invalid(file, "not a regular file")
            data = stream.read(MAX_SPEC_BYTES + 1)
    except OSError as error:
        raise _invalid(file, f"cannot be read: {error.strerror}") from None
    if len(data) > MAX_SPEC_BYTES:
        raise _invalid(file, f"too large; a spec has at most {MAX_SPEC_BYTES:,} bytes")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise _invalid(file, "not UTF-8 text", line=line, fix="save the file as UTF-8") from None


def _bound(text: str, file: str) -> None:
    """Refuse what is too deep or too long for the recursive composer, whose stack is C's.

    Raises:
        InvalidSpec: more than MAX_DEPTH levels or MAX_NODES values, aliases not followed.
    """
    depth = num_nodes = 0
    for event in yaml.parse(text, Loader=yaml.CSafeLoader):
        if isinstance(event, yaml.NodeEvent):
            num_nodes += 1
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MAX_DEPTH or num_nodes > MAX_NODES:
            line = event.start_mark.line + 1 if event.start_mark else 1
            raise _too_much(file, depth, line)


def _too_much(file: str, depth: int, line: int) -> InvalidSpec:
    what = f"nested over {MAX_DEPTH} levels" if depth > MAX_DEPTH else f"over {MAX_NODES:,} values"
    return _invalid(file, f"{what}; no spec is that large", line=line, rule="not-yaml")


_scalars = yaml.CSafeLoader("")
_COLLECTIONS = {f"tag:yaml.org,2002:{tag}" for tag in ("map", "seq", "set", "omap", "pairs")}
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


@dataclass
class _Builder:
    """Builds plain values from YAML nodes, noting the line of each path.

    Aliases are followed, so a small file may name very many values: each one built is counted.
    """

    file: str
    lines: dict[Path_, int] = field(default_factory=dict)
    num_built: int = 0
    depth: int = 0

    def build(self, node: yaml.Node, path: Path_) -> Any:
        self.num_built += 1
        self.depth += 1  # not len(path): a merge that names itself adds no key
        if self.num_built > MAX_NODES or self.depth > MAX_DEPTH:
            raise _too_much(self.file, self.depth, _line(node))
        self.lines.setdefault(path, _line(node))
        value = self._value(node, path)
        self.depth -= 1
        return value

    def _value(self, node: yaml.Node, path: Path_) -> Any:
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        if node.tag not in _COLLECTIONS:
            raise self._broken(node, f"not valid YAML: no safe reader knows the tag {node.tag}")
        if isinstance(node, yaml.SequenceNode):
            return [self.build(item, (*path, i)) for i, item in enumerate(node.value)]
        assert isinstance(node, yaml.MappingNode)
        return self._mapping(node, path)

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        if node.tag in _NUMBERS and len(node.value) > 100:  # 1:1:1:… takes square time
            raise self._broken(node, "a number of over 100 digits")
        try:
            return _scalars.construct_object(node)
        except yaml.YAMLError:
            raise
        except Exception as error:  # what PyYAML's own constructors let through: `!!bool x`
            raise self._broken(node, f"not valid YAML: {error}") from None

    def _mapping(self, node: yaml.MappingNode, path: Path_) -> dict[str, Any]:
        result: dict[str, Any] = {}
        own: dict[str, int] = {}
        merged = [value for key, value in node.value if _is_merge(key)]
        for value in merged:  # what `<<: *base` brings, under the mapping's own keys
            result = {**self._merge(value, path), **result}
        for key_node, value_node in node.value:
            if _is_merge(key_node):
                continue
            key, line = self._key(key_node), _line(key_node)
            if key in own:
                raise _invalid(
                    self.file,
                    f"`{key}` is given twice, first on line {own[key]}",
                    line=line,
                    fix="keep one; YAML readers silently take the last",
                    rule="duplicate-key",
                )
            own[key] = self.lines[(*path, key)] = line
            result[key] = self.build(value_node, (*path, key))
        return result

    def _merge(self, node: yaml.Node, path: Path_) -> dict[str, Any]:
        if not isinstance(node, yaml.SequenceNode):
            value = self.build(node, path)
            if not isinstance(value, dict):
                raise self._broken(node, "`<<` takes a mapping: `<<: *name`")
            return value
        merged: dict[str, Any] = {}
        for item in node.value:
            if isinstance(item, yaml.SequenceNode):
                raise self._broken(item, "`<<` takes a mapping or a list of mappings")
            merged = {**self._merge(item, path), **merged}
        return merged

    def _key(self, node: yaml.Node) -> str:
        if isinstance(node, yaml.ScalarNode):
            return str(node.value)
        raise self._broken(node, "a key must be plain text")

    def _broken(self, node: yaml.Node, what: str) -> InvalidSpec:
        return _invalid(self.file, what, line=_line(node), rule="not-yaml")


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _is_merge(node: yaml.Node) -> bool:
    return bool(node.tag == "tag:yaml.org,2002:merge")


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
    try:
        target[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise InputError(f"--set {override}: {text} is not valid YAML", "quote it") from None


def _finding(document: Document, model: type[BaseModel], fault: Any) -> Finding:
    loc: Path_ = tuple(fault["loc"])
    key = _short(".".join(map(str, loc)), 200)
    line = document.line(loc)
    if fault["type"] == "extra_forbidden":
        return Finding(
            file=document.file,
            line=line,
            what=f"unknown key `{key}`",
            fix=_nearest(model, loc),
            rule="unknown-key",
        )
    if fault["type"] == "missing":
        return Finding(
            file=document.file,
            line=line,
            what=f"`{key}` is missing",
            fix=f"add `{loc[-1]}: …`",
            rule="missing-key",
        )
    if fault["type"] in ("value_error", "assertion_error"):
        what, _, fix = str(fault["ctx"]["error"]).partition("; ")
        what = f"`{key}`: {what}" if key else what
        return Finding(file=document.file, line=line, what=what, fix=fix, rule="wrong-value")
    given = _short(repr(fault["input"]), 60)
    message = fault["msg"][0].lower() + fault["msg"][1:].replace("a valid tuple", "a list")
    what = f"`{key}` is {given}"
    return Finding(file=document.file, line=line, what=what, fix=message, rule="wrong-value")


def _short(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _nearest(model: type[BaseModel], loc: Path_) -> str:
    fields = sorted(_fields(model, loc[:-1]))
    close = difflib.get_close_matches(str(loc[-1])[:64], fields, n=1)
    if close:
        return f"did you mean `{close[0]}`?"
    return f"known keys: {', '.join(fields)}" if fields else "remove it"


def _fields(annotation: Any, loc: Path_) -> set[str]:
    """Field names of the models found by walking `loc` through a type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        if not loc:
            return {field.alias or name for name, field in annotation.model_fields.items()}
        field = annotation.model_fields.get(str(loc[0]))
        return _fields(field.annotation, loc[1:]) if field else set()
    names: set[str] = set()
    for inner in typing.get_args(annotation):
        deeper = loc[1:] if loc and typing.get_origin(annotation) in (dict, list, tuple) else loc
        names |= _fields(inner, deeper)
    return names
