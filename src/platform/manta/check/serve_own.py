"""Rules over the arguments of the applications that Manta itself ships."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from manta.check.rules import Fault, File, Project, rule
from manta.check.serve import applications
from manta.errors import InvalidSpec
from manta.spec.apps import EmbeddingsArgs, RagArgs
from manta.spec.gateway import GatewayArgs
from manta.spec.loading import Document, Path_, Spec, validate
from manta.spec.serve import Application

_ARGS: dict[str, type[Spec]] = {
    "manta.serving.embeddings:build_app": EmbeddingsArgs,
    "manta.serving.rag:build_app": RagArgs,
    "manta.serving.gateway:build_gateway_app": GatewayArgs,
}
_GATEWAY = "manta.serving.gateway:build_gateway_app"


@rule("serve-own-argument", "error", "serve")
def own_argument(file: File, project: Project) -> Iterator[Fault]:
    """Applications that Manta ships refuse unknown arguments, when they are already building."""
    for path, application in applications(file):
        if model := _ARGS.get(application.import_path):
            yield from _misfits(file, (*path, "args"), application.args, model)


def _misfits(file: File, path: Path_, args: dict[str, Any], model: type[Spec]) -> Iterator[Fault]:
    lines = {
        at[len(path) :]: n for at, n in file.document.lines.items() if at[: len(path)] == path
    }
    document = Document(file.name, args, {(): file.document.line(path) or 1, **lines})
    try:
        validate(document, model)
    except InvalidSpec as error:
        for finding in error.findings:
            yield Fault(path, finding.what, finding.fix, line=finding.line)


@rule("serve-gateway-loop", "error", "serve")
def gateway_loop(file: File, project: Project) -> Iterator[Fault]:
    """A gateway that names itself as a target asks itself until it refuses."""
    for at, application, target in _targets(file):
        if target.get("app") == application.name and not target.get("cluster"):
            fix = "name the application that has the model"
            yield Fault((*at, "app"), f"`{application.name}` is the gateway itself", fix)


@rule("serve-gateway-clear", "warning", "serve")
def gateway_clear(file: File, project: Project) -> Iterator[Fault]:
    """Whoever sits on the way reads a key that goes over plain HTTP, and every prompt."""
    for at, _, target in _targets(file):
        url = target.get("url")
        has_key = target.get("api_key_file") or target.get("api_key_env")
        if isinstance(url, str) and url.startswith("http://") and has_key and not _is_here(url):
            what = f"the key goes to {url[:100]} in clear"
            yield Fault((*at, "url"), what, "write https://, or keep both in one closed network")


def _is_here(url: str) -> bool:
    host = url.removeprefix("http://").partition("/")[0].rpartition(":")[0] or url[7:]
    return host.startswith(("127.", "localhost", "[::1]"))


def _targets(file: File) -> Iterator[tuple[Path_, Application, dict[str, Any]]]:
    """Each target of each gateway, with its path."""
    for path, application in applications(file):
        models = application.args.get("models")
        if application.import_path != _GATEWAY or not isinstance(models, dict):
            continue
        for name, model in models.items():
            for kind in ("to", "fallback") if isinstance(model, dict) else ():
                listed = model.get(kind)
                for i, target in enumerate(listed if isinstance(listed, list) else ()):
                    if isinstance(target, dict):
                        at = (*path, "args", "models", name, kind, i)
                        yield at, application, target
