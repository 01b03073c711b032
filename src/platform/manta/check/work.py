"""Rules over job and pipeline specs: what they name must exist, fit, and have an order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from manta.errors import Finding, InvalidSpec
from manta.spec import WORKLOADS, Document, JobSpec, PipelineSpec, Step, load, read, script_of
from manta.spec.expand import Expanded, expand


def job(document: Document, spec: JobSpec, root: Path) -> Iterator[Finding]:
    """Findings of a job file; `root` is the working directory that will be shipped."""
    yield from _entrypoint(document, (), spec.entrypoint, spec.config, root)


def pipeline(document: Document, spec: PipelineSpec, root: Path) -> Iterator[Finding]:
    """Findings of a pipeline file; `root` is the working directory that will be shipped."""
    yield from _names(document, spec)
    yield from _cycle(document, spec)
    try:
        steps = expand(spec, document, None)
    except InvalidSpec as error:
        yield from error.findings
        return
    yield from dict.fromkeys(finding for one in steps for finding in _step(document, one, root))


def _step(document: Document, expanded: Expanded, root: Path) -> Iterator[Finding]:
    step, path = expanded.step, ("steps", expanded.index)
    config = None if _is_open(step.config) else step.config
    if step.entrypoint:
        yield from _entrypoint(document, path, step.entrypoint, config, root)
    if step.deploy and not _is_open(step.deploy) and not _is_file(root / step.deploy):
        yield _missing(document, (*path, "deploy"), step.deploy, root)


def _is_open(name: str | None) -> bool:
    """Whether it names a parameter whose value only the run tells."""
    return "${{" in (name or "")


def _entrypoint(
    document: Document,
    path: tuple[str | int, ...],
    entrypoint: str,
    config: str | None,
    root: Path,
) -> Iterator[Finding]:
    script = script_of(entrypoint)
    if script and not Path(script).is_absolute() and not _is_file(root / script):
        yield _missing(document, (*path, "entrypoint"), script, root)
    if config and not _is_file(root / config):
        yield _missing(document, (*path, "config"), config, root)
    elif config and script in WORKLOADS:
        yield from _config(root / config, script)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long
        return False


def _config(file: Path, script: str) -> Iterator[Finding]:
    """The faults of a workload's own config, found before the job starts and not in it."""
    try:
        load(_shown(file), WORKLOADS[script])
    except InvalidSpec as error:
        yield from error.findings


def _shown(file: Path) -> str:
    return str(file.relative_to(Path.cwd())) if file.is_relative_to(Path.cwd()) else str(file)


def _missing(document: Document, path: tuple[str | int, ...], name: str, root: Path) -> Finding:
    return Finding(
        file=document.file,
        line=document.line(path),
        rule="missing-file",
        what=f"`{path[-1]}` names {name}, which is not in the working directory {root}",
        fix="write a path relative to the working directory, or change to it with --working-dir",
    )


def _names(document: Document, spec: PipelineSpec) -> Iterator[Finding]:
    seen: set[str] = set()
    known = {step.name for step in spec.steps}
    for index, step in enumerate(spec.steps):
        if step.name in seen:
            yield Finding(
                file=document.file,
                line=document.line(("steps", index, "name")),
                rule="step-name-twice",
                what=f"two steps are named `{step.name}`",
                fix="give each step its own name",
            )
        seen.add(step.name)
        for need in step.needs:
            if need not in known:
                yield Finding(
                    file=document.file,
                    line=document.line(("steps", index, "needs")),
                    rule="unknown-need",
                    what=f"step `{step.name}` needs `{need}`, which is no step here",
                    fix=f"write one of: {', '.join(sorted(known - {step.name}))}",
                )


def _cycle(document: Document, spec: PipelineSpec) -> Iterator[Finding]:
    remaining: dict[str, Step] = {step.name: step for step in spec.steps}
    while ready := [s for s in remaining.values() if not remaining.keys() & set(s.needs)]:
        for step in ready:
            del remaining[step.name]
    if remaining:
        first = next(iter(remaining))
        index = next(i for i, step in enumerate(spec.steps) if step.name == first)
        yield Finding(
            file=document.file,
            line=document.line(("steps", index, "needs")),
            rule="needs-cycle",
            what=f"steps wait for each other in a circle: {', '.join(remaining)}",
            fix="drop one of their `needs`",
        )


def load_job(file: str, root: Path) -> JobSpec:
    """A job file without faults. Raises InvalidSpec with every finding."""
    spec = load(file, JobSpec)
    _refuse(job(read(file), spec, root))
    return spec


def load_pipeline(file: str, root: Path, given: Mapping[str, str] | None = None) -> PipelineSpec:
    """A pipeline file without faults, as it runs with the parameters that are given.

    Raises:
        InvalidSpec: with every finding.
        InputError: a parameter is unknown or has no value.
    """
    spec, document = load(file, PipelineSpec), read(file)
    _refuse(pipeline(document, spec, root))
    expanded = expand(spec, document, given or {})
    _refuse(finding for one in expanded for finding in _step(document, one, root))
    return spec.model_copy(update={"steps": tuple(one.step for one in expanded)})


def _refuse(findings: Iterator[Finding]) -> None:
    if errors := [finding for finding in findings if finding.severity == "error"]:
        raise InvalidSpec(errors)
