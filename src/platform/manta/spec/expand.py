"""Parameters and matrices of a pipeline: one file for many runs, one step for many jobs.

`${{ params.NAME }}` stands for a value of `params` or of `--param NAME=VALUE`, `${{ matrix.KEY }}`
for one of the values in the step's own `matrix`, and `${{ needs.STEP.outputs.NAME }}` for the URL
of what a step before it made, known only when that has run.
"""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from manta.errors import Finding, InputError, InvalidSpec
from manta.spec.jobs import PipelineSpec, Scalar, Step
from manta.spec.loading import Document, Path_

MAX_STEPS = 1000
"""Of one pipeline, all combinations counted."""

_REFERENCE = re.compile(r"\$\{\{\s*(.*?)\s*\}\}")
OUTPUT = re.compile(r"\$\{\{\s*needs\.([^\s}]+)\.outputs\.([\w-]+)\s*\}\}")
"""Reference to what a step made: groups step as it runs, artifact."""
_FIELDS = ("entrypoint", "config", "deploy")


@dataclass(frozen=True, kw_only=True)
class Expanded:
    """A step as it runs."""

    index: int
    """Of the step in the file that it comes from."""
    step: Step
    """Without references and matrix; its needs name steps as they run."""


def expand(
    spec: PipelineSpec, document: Document, given: Mapping[str, str] | None
) -> list[Expanded]:
    """All steps, one for each combination of their matrices.

    Args:
        spec: the pipeline.
        document: its file, for the lines of what is wrong.
        given: values of parameters; None to check a file without running it, when a parameter
            that has no value stands for itself.

    Raises:
        InputError: a parameter that the file does not have, or has no value for.
        InvalidSpec: a reference to nothing, or too many steps, or two of one name.
    """
    params = _values(spec, given)
    combined = {step.name: _combinations(step) for step in spec.steps}
    if sum(map(len, combined.values())) > MAX_STEPS:
        raise _invalid(document, ("steps",), f"more than {MAX_STEPS} steps with all combinations")
    faults: list[Finding] = []
    expanded = []
    for index, step in enumerate(spec.steps):
        for values in combined[step.name]:
            known = params | {f"matrix.{key}": _shown(value) for key, value in values.items()}
            before = {need: tuple(_needed(need, combined, values)) for need in step.needs}
            known |= _outputs(step, before)
            faults += _unknown(step, known, document, index)
            needs = tuple(name for names in before.values() for name in names)
            told = _replaced(step, known) | {"name": _name(step, values), "needs": needs}
            expanded.append(Expanded(index=index, step=step.model_copy(update=told)))
    names = [one.step.name for one in expanded]
    for one in expanded:
        if names.count(one.step.name) > 1 and spec.steps[one.index].matrix:
            what = f"two steps run as `{one.step.name}`"
            faults += _invalid(document, ("steps", one.index, "matrix"), what).findings
    if faults:
        raise InvalidSpec(dict.fromkeys(faults))
    return expanded


def _values(spec: PipelineSpec, given: Mapping[str, str] | None) -> dict[str, str]:
    for name in given or {}:
        if name not in spec.params:
            known = ", ".join(spec.params) or "it has none"
            raise InputError(
                f"pipeline `{spec.name}` has no parameter `{name}`", f"known: {known}"
            )
    values: dict[str, str] = {}
    for name, default in spec.params.items():
        reference = f"params.{name}"
        if given and name in given:
            values[reference] = given[name]
        elif default is not None:
            values[reference] = _shown(default)
        elif given is not None:
            raise InputError(f"parameter `{name}` has no value", f"give --param {name}=VALUE")
        else:
            values[reference] = f"${{{{ {reference} }}}}"
    return values


def _combinations(step: Step) -> list[dict[str, Scalar]]:
    return [
        dict(zip(step.matrix, values, strict=True))
        for values in itertools.product(*step.matrix.values())
    ]


def _needed(
    need: str, combined: Mapping[str, list[dict[str, Scalar]]], values: Mapping[str, Scalar]
) -> Iterator[str]:
    """Steps that `need` stands for: all of its combinations that do not differ in a shared key."""
    for other in combined.get(need, ()):
        if all(values.get(key, value) == value for key, value in other.items()):
            yield _named(need, other)


def _outputs(step: Step, before: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    """References to outputs that stand for one step, as they are kept until it has run."""
    known = {}
    for text in (step.entrypoint or "", *step.environment.values()):
        for need, output in OUTPUT.findall(text):
            names = before.get(need) or tuple(n for ns in before.values() for n in ns if n == need)
            if len(names) == 1:
                reference = f"needs.{names[0]}.outputs.{output}"
                known[f"needs.{need}.outputs.{output}"] = f"${{{{ {reference} }}}}"
    return known


def _name(step: Step, values: Mapping[str, Scalar]) -> str:
    return _named(step.name, values)


def _named(name: str, values: Mapping[str, Scalar]) -> str:
    parts = [re.sub(r"[^a-z0-9._-]+", "-", _shown(value).lower()) for value in values.values()]
    return "-".join([name, *parts])[:63]


def _shown(value: Scalar) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value}"


def _replaced(step: Step, known: Mapping[str, str]) -> dict[str, Any]:
    told: dict[str, Any] = {"matrix": {}}
    for name in _FIELDS:
        if text := getattr(step, name):
            is_shell = name == "entrypoint"
            told[name] = _filled(text, known, is_shell=is_shell)
    told["environment"] = {
        name: _filled(text, known, is_shell=False) for name, text in step.environment.items()
    }
    return told


def _filled(text: str, known: Mapping[str, str], *, is_shell: bool) -> str:
    def value(match: re.Match[str]) -> str:
        found = known.get(match[1], match[0])
        return shlex.quote(found) if is_shell and not OUTPUT.fullmatch(found) else found

    return _REFERENCE.sub(value, text)


def _unknown(
    step: Step, known: Mapping[str, str], document: Document, index: int
) -> Iterator[Finding]:
    """References that stand for nothing, or for several things."""
    texts = {name: getattr(step, name) or "" for name in _FIELDS}
    texts |= {f"environment.{name}": text for name, text in step.environment.items()}
    for where, text in texts.items():
        for name in _REFERENCE.findall(text):
            is_output = name.startswith("needs.")
            if name not in known or (is_output and where in ("config", "deploy")):
                fix = _fix(step, known, is_output=is_output)
                path: Path_ = ("steps", index, *where.split(".", 1))
                yield Finding(
                    file=document.file,
                    line=document.line(path),
                    rule="unknown-reference",
                    what=f"`${{{{ {name} }}}}` stands for nothing",
                    fix=fix,
                )


def _fix(step: Step, known: Mapping[str, str], *, is_output: bool) -> str:
    if is_output:
        needs = ", ".join(step.needs) or "it has none"
        return (
            "write needs.STEP.outputs.NAME in `entrypoint` or `environment`, STEP being one of "
            f"`needs` ({needs}); of a matrix name one combination"
        )
    return f"write one of: {', '.join(known)}" if known else "add it to `params`"


def _invalid(document: Document, path: Path_, what: str) -> InvalidSpec:
    line = document.line(path)
    return InvalidSpec(
        [Finding(file=document.file, line=line, rule="matrix", what=what, fix="give fewer values")]
    )
