"""Rules over every kind of file: secrets in plain text, and runtime environments."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from manta.check.facts.serving import RUNTIME_ENV_KEYS
from manta.check.rules import Fault, File, Kind, Project, nearest, rule, texts
from manta.spec.loading import Path_

_EVERY: tuple[Kind, ...] = ("cluster", "serve", "job", "pipeline", "workload")

_KNOWN_SECRETS = re.compile(
    r"\b(AKIA|ASIA)[A-Z0-9]{16}\b"  # AWS access key
    r"|\bhf_[A-Za-z0-9]{20,}\b"  # Hugging Face
    r"|\b(ghp|gho|ghs|github_pat)_[A-Za-z0-9_]{20,}\b"
    r"|\bsk-[A-Za-z0-9_-]{20,}\b"  # OpenAI and others
    r"|\bAIza[A-Za-z0-9_-]{35}\b"  # Google API key
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
    r"|\bxox[abp]-[A-Za-z0-9-]{10,}\b"  # Slack
)
_SECRET_NAME = re.compile(
    r"(^|[_-])(password|passwd|secret|api[_-]?key|secret[_-]?(access[_-]?)?key|access[_-]?key"
    r"|account[_-]?key|auth[_-]?token|access[_-]?token|session[_-]?token|hf[_-]?token|credentials)$",
    re.IGNORECASE,
)
_ASSIGNED = re.compile(r"\b([A-Za-z][A-Za-z0-9_]{2,40})=(?:'([^']*)'|\"([^\"]*)\"|([^\s;'\"&|]+))")
_PLACEHOLDER = re.compile(
    r"[<>$*…{}]|\.\.\.|^$|your|example|change|replace|redacted|dummy|placeholder|xxx|todo|insert"
    r"|^(none|null|true|false|anonymous)$",
    re.IGNORECASE,
)
_FAKE_KEYS = ("EMPTY", "ray_auth_token")


@rule("secret-plain", "error", _EVERY)
def secret_plain(file: File, project: Project) -> Iterator[Fault]:
    """A secret in a file ends in version control, in logs and on every node; rotate it."""
    fix = "take it from the environment, a file mount or a role, and rotate this one"
    for path, what in plain(file.value):
        yield Fault(path, f"{what} stands here in plain text", fix)


def plain(value: Any) -> Iterator[tuple[Path_, str]]:
    """Path of every text in `value` that is or holds a secret, and what it is called."""
    for path, text in texts(value):
        if _KNOWN_SECRETS.search(text[:100_000]):
            yield path, "a secret key"
        elif name := _secret_name(path, text[:100_000]):
            yield path, f"`{name}`"


def _secret_name(path: Path_, text: str) -> str | None:
    key = str(path[-1]) if path else ""
    if _SECRET_NAME.search(key) and _is_real(text):
        return key
    for match in _ASSIGNED.finditer(text):
        value = match[2] or match[3] or match[4] or ""
        if _SECRET_NAME.search(match[1]) and _is_real(value):
            return match[1]
    return None


def _is_real(value: str) -> bool:
    """Whether a value looks like a secret, and not like a stand-in or a path to one."""
    if len(value) < 6 or value.startswith(("/", "~", "./", "http:", "https:", "s3:", "gs:")):
        return False
    return not _PLACEHOLDER.search(value) and value not in _FAKE_KEYS and " " not in value


@rule("runtime-env-key", "error", ("serve", "job", "pipeline"))
def runtime_env_key(file: File, project: Project) -> Iterator[Fault]:
    """Ray takes unknown runtime_env keys with a log line; a misspelt one has no effect."""
    for path, env in runtime_envs(file.value):
        for key in env.keys() - RUNTIME_ENV_KEYS:
            if close := nearest(key, RUNTIME_ENV_KEYS):
                yield Fault((*path, key), f"unknown key `{key}`", f"did you mean `{close}`?")


@rule("runtime-env-conflict", "error", ("serve", "job", "pipeline"))
def runtime_env_conflict(file: File, project: Project) -> Iterator[Fault]:
    """Ray installs packages in one way only and refuses two."""
    for path, env in runtime_envs(file.value):
        given = [key for key in ("pip", "uv", "conda") if env.get(key)]
        if len(given) > 1:
            what = f"`{given[0]}` stands beside `{given[1]}`"
            yield Fault((*path, given[1]), what, "keep one")


@rule("runtime-env-variable", "error", ("serve", "job", "pipeline"))
def runtime_env_variable(file: File, project: Project) -> Iterator[Fault]:
    """Ray refuses environment variables that are not text; YAML reads 1 and true as others."""
    for path, env in runtime_envs(file.value):
        variables = env.get("env_vars")
        for name, value in variables.items() if isinstance(variables, dict) else ():
            if not isinstance(value, str):
                shown = "true" if value is True else "false" if value is False else value
                where = (*path, "env_vars", name)
                yield Fault(where, f"{name} is {shown}, not text", f'write "{shown}"')


@rule("serve-local-package", "error", "serve")
def serve_local_package(file: File, project: Project) -> Iterator[Fault]:
    """A Serve config ships nothing; Ray refuses paths of this machine in it."""
    for path, env in runtime_envs(file.value):
        modules = env.get("py_modules")
        uris = [env.get("working_dir"), *(modules if isinstance(modules, list) else ())]
        for uri in uris:
            if isinstance(uri, str) and uri and "://" not in uri:
                key = "working_dir" if uri == env.get("working_dir") else "py_modules"
                fix = "upload it and write its URI, or local:///path for a folder on every node"
                yield Fault((*path, key), f"`{uri}` is a path of this machine", fix)


def runtime_envs(value: Any, path: Path_ = ()) -> Iterator[tuple[Path_, dict[str, Any]]]:
    """Every runtime_env in a file, but not inside one."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "runtime_env" and isinstance(inner, dict):
                yield (*path, key), inner
            else:
                yield from runtime_envs(inner, (*path, key))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from runtime_envs(inner, (*path, i))
