"""What a rule is. Rules live in the files beside this one, grouped by what they look at."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from manta.errors import Finding, Severity
from manta.spec.catalog import Catalog
from manta.spec.loading import Document, Path_, Spec

Kind = Literal[
    "cluster", "serve", "job", "pipeline", "workload", "kubernetes", "prices", "unknown"
]


@dataclass(frozen=True, kw_only=True)
class File:
    """One file that could be read, and what kind of file it is."""

    document: Document
    kind: Kind
    spec: Spec | None = None
    """The typed spec, if all types fit."""

    @property
    def name(self) -> str:
        """Path as the user gave it."""
        return self.document.file

    @property
    def value(self) -> dict[str, Any]:
        """Plain values of the file."""
        value: dict[str, Any] = self.document.value
        return value


@dataclass(frozen=True, kw_only=True)
class Project:
    """Everything that is checked together: some faults lie between files."""

    files: tuple[File, ...]
    catalog: Catalog
    root: Path
    """Working directory that jobs would ship."""

    def of_kind(self, kind: Kind) -> tuple[File, ...]:
        """Files of one kind, in the order given."""
        return tuple(file for file in self.files if file.kind == kind)


@dataclass(frozen=True)
class Fault:
    """What a rule saw at a path of a file; the rule's name and severity are added later."""

    path: Path_
    what: str
    fix: str = ""
    file: str | None = None
    """Another file than the one looked at, with `line`."""
    line: int | None = None


Look = Callable[[File, Project], Iterable[Fault]]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One thing that can be wrong."""

    id: str
    severity: Severity
    reason: str
    """Why it matters: one line, for `manta check --rules`."""
    kinds: tuple[Kind, ...]
    look: Look | None = None
    """None: found while reading the file (`manta.spec.loading`)."""

    def findings(self, file: File, project: Project) -> Iterable[Finding]:
        """Findings in one file."""
        if self.look is None or file.kind not in self.kinds:
            return
        if file.spec is None:
            return  # its types do not fit: said already
        for fault in self.look(file, project):
            yield Finding(
                file=fault.file or file.name,
                line=fault.line or (None if fault.file else file.document.line(fault.path)),
                what=_short(fault.what),
                fix=_short(fault.fix),
                rule=self.id,
                severity=self.severity,
            )


def _short(text: str) -> str:
    return text if len(text) <= 400 else text[:399] + "…"


RULES: dict[str, Rule] = {}


def rule(id: str, severity: Severity, kinds: Kind | tuple[Kind, ...]) -> Callable[[Look], Look]:
    """Register the decorated function as the rule `id`; its docstring is the rule's reason."""

    def register(look: Look) -> Look:
        given = (kinds,) if isinstance(kinds, str) else kinds
        assert id not in RULES, id
        reason = " ".join((look.__doc__ or "").split())
        assert reason, id
        reason = " ".join((look.__doc__ or "").split())
        assert reason, id
        RULES[id] = Rule(id=id, severity=severity, reason=reason, kinds=given, look=look)
        return look

    return register


def register_reading_rule(id: str, severity: Severity, reason: str) -> None:
    """Register a rule that is held while files are read."""
    RULES[id] = Rule(id=id, severity=severity, reason=reason, kinds=())


def nearest(name: str, known: Collection[str]) -> str | None:
    """The known name that `name` is probably a misspelling of; None if it is like none."""
    if len(name) > 64:
        return None
    folded = {_fold(other): other for other in known}
    if _fold(name) in folded:
        return folded[_fold(name)]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    return close[0] if close else None


def did_you_mean(name: str, known: Collection[str]) -> str:
    """A fix that names the nearest known name, or nothing."""
    close = nearest(name, known)
    return f"did you mean `{close}`?" if close else ""


def _fold(name: str) -> str:
    return name.replace("_", "").replace("-", "").lower()


def misspelt_keys(
    value: Any, path: Path_, known: Mapping[str, Collection[str]], dotted: str = ""
) -> Iterable[Fault]:
    """Keys of `value`, at every depth that `known` covers, that are nearly but not quite known.

    Args:
        value: mapping or list of mappings.
        path: where `value` stands in the file.
        known: dotted path below `value` → keys there; lists add no level.
        dotted: the dotted path of `value` itself.
    """
    if isinstance(value, list):
        for i, item in enumerate(value):
            yield from misspelt_keys(item, (*path, i), known, dotted)
    if not isinstance(value, dict) or dotted not in known:
        return
    for key, inner in value.items():
        if key in known[dotted]:
            below = f"{dotted}.{key}".strip(".")
            yield from misspelt_keys(inner, (*path, key), known, below)
        elif close := nearest(key, known[dotted]):
            yield Fault((*path, key), f"unknown key `{key}`", f"did you mean `{close}`?")


def unknown_keys(
    value: Any, path: Path_, known: Mapping[str, Collection[str]], dotted: str = ""
) -> Iterable[Fault]:
    """Keys like `misspelt_keys`, but those that resemble no known key."""
    if isinstance(value, list):
        for i, item in enumerate(value):
            yield from unknown_keys(item, (*path, i), known, dotted)
    if not isinstance(value, dict) or dotted not in known:
        return
    for key, inner in value.items():
        if key in known[dotted]:
            yield from unknown_keys(inner, (*path, key), known, f"{dotted}.{key}".strip("."))
        elif not nearest(key, known[dotted]):
            some = ", ".join(sorted(known[dotted])[:12])
            yield Fault((*path, key), f"unknown key `{key}`", f"keys here: {some} …")


def texts(value: Any, path: Path_ = ()) -> Iterator[tuple[Path_, str]]:
    """Every string in a file, with its path."""
    """Without RAY_AUTH_MODE=token whoever reaches a port runs code (CVE-2023-48022)."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from texts(inner, (*path, key))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from texts(inner, (*path, i))
