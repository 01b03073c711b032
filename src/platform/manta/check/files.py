"""Check files: read each, tell what kind it is, run the rules, between files too."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from manta.check import work
from manta.check.rules import RULES, File, Kind, Project
from manta.errors import Finding, InputError, InvalidSpec
from manta.spec import WORKLOADS, Document, JobSpec, PipelineSpec, Spec, read, validate
from manta.spec.catalog import Catalog, load_catalog
from manta.spec.cluster import ClusterSpec
from manta.spec.serve import ServeSpec

MAX_FINDINGS_PER_FILE = 100
_SEVERITIES = ("error", "warning", "info")
_MODELS: dict[Kind, type[Spec]] = {
    "cluster": ClusterSpec,
    "serve": ServeSpec,
    "job": JobSpec,
    "pipeline": PipelineSpec,
}


def files(paths: Iterable[str | Path], root: Path | None = None) -> tuple[Finding, ...]:
    """Findings of all rules over `paths`, which are checked together, in the order given.

    Args:
        paths: YAML files.
        root: working directory that jobs would ship; by default the current one.

    Returns:
        Findings by file and line. Nothing is raised for what a file holds.
    """
    findings: list[Finding] = []
    loaded: list[File] = []
    for path in dict.fromkeys(map(str, paths)):
        file, faults = _load(path)
        findings += faults
        loaded += [file] if file else []
    project = Project(files=tuple(loaded), catalog=_catalog(), root=root or Path.cwd())
    for file in loaded:
        findings += _of_file(file, project)
    return _in_order(findings)


def _of_file(file: File, project: Project) -> Iterator[Finding]:
    if isinstance(file.spec, JobSpec):
        yield from work.job(file.document, file.spec, project.root)
    if isinstance(file.spec, PipelineSpec):
        yield from work.pipeline(file.document, file.spec, project.root)
    for each in RULES.values():
        yield from each.findings(file, project)


def _load(path: str) -> tuple[File | None, list[Finding]]:
    """A file and what is wrong with its keys and types."""
    try:
        document = read(path)
    except InvalidSpec as error:
        return _kubernetes(path, error)
    kind = _kind(document)
    if kind == "kubernetes":
        return None, [_not_checked(path)]
    if kind == "unknown":
        return None, [_unknown_kind(document)]
    model = WORKLOADS[_script(document)] if kind == "workload" else _MODELS[kind]
    spec, faults = _typed(document, model)
    return File(document=document, kind=kind, spec=spec), faults


def _typed(document: Document, model: type[Spec]) -> tuple[Spec | None, list[Finding]]:
    """The spec, read past its unknown keys so that a misspelling hides no other fault."""
    try:
        return validate(document, model), []
    except InvalidSpec as error:
        faults = list(error.findings)
    if any(fault.rule != "unknown-key" for fault in faults):
        return None, faults
    try:
        return model.model_validate(document.value, extra="ignore"), faults
    except ValueError:
        return None, faults


def _kind(document: Document) -> Kind:
    keys = document.value.keys()
    if {"apiVersion", "kind"} <= keys:
        return "kubernetes"
    if keys & {"cluster_name", "provider", "available_node_types"}:
        return "cluster"
    if keys & {"applications", "import_path"}:
        return "serve"
    if "steps" in keys and "search" not in keys:
        return "pipeline"
    if "entrypoint" in keys:
        return "job"
    return "workload" if _script(document) else "unknown"


def _script(document: Document) -> str:
    """The script whose config this looks like: most of its keys, at least two, are that one's.

    Of equally likely ones the one that the file is named after; "" if none is.
    """
    keys = set(document.value)
    shared = {script: len(keys & set(model.model_fields)) for script, model in WORKLOADS.items()}
    named = f"jobs/{Path(document.file).stem}.py"
    best = max(shared, key=lambda script: (shared[script], script == named))
    return best if shared[best] >= 2 and shared[best] * 2 >= len(keys) else ""


def _kubernetes(path: str, error: InvalidSpec) -> tuple[None, list[Finding]]:
    """Kubernetes manifests may hold several documents, which no file of ours does."""
    if "another document" in str(error) and _mentions_kubernetes(path):
        return None, [_not_checked(path)]
    return None, list(error.findings)


def _mentions_kubernetes(path: str) -> bool:
    with Path(path).open(errors="replace") as stream:
        lines = stream.read(1_000_000).splitlines()
    return any(line.startswith("apiVersion:") for line in lines)


def _not_checked(path: str) -> Finding:
    return Finding(
        file=path,
        line=1,
        rule="kubernetes-not-checked",
        severity="info",
        what="a Kubernetes manifest; not checked",
        fix="kubectl apply --dry-run=server checks it against its CRD",
    )


def _unknown_kind(document: Document) -> Finding:
    keys = ", ".join(list(document.value)[:5])
    return Finding(
        file=document.file,
        line=document.line(()),
        rule="unknown-kind",
        what=f"not a file that can be checked (its keys: {keys[:80] or 'none'})",
        fix="known are Ray cluster YAMLs, Serve configs, job and pipeline specs and their configs",
    )


@functools.cache
def _catalog() -> Catalog:
    try:
        return load_catalog()
    except InputError:  # no price files here: then nothing is known of machine sizes
        return Catalog()


def _in_order(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Without repeats, by file as first seen, then line; a flood from one file is cut."""
    by_file: dict[str, list[Finding]] = {}
    for finding in dict.fromkeys(findings):
        by_file.setdefault(finding.file, []).append(finding)
    ordered: list[Finding] = []
    for faults in by_file.values():
        faults.sort(key=lambda finding: _SEVERITIES.index(finding.severity))  # errors are kept
        ordered += sorted(faults[:MAX_FINDINGS_PER_FILE], key=lambda finding: finding.line or 0)
    return tuple(ordered)


def project_files(root: Path) -> tuple[str, ...]:
    """The files that a project keeps in its usual places, relative to `root`."""
    patterns: Any = ("cluster/*.yaml", "configs/**/*.yaml", "serve_apps/*.yaml")
    found = (path for pattern in patterns for path in sorted(root.glob(pattern)))
    return tuple(str(path.relative_to(root)) for path in found)
