"""Which metrics exist: the guard's and the queue's own, and those that Ray and vLLM define.

Theirs are read from the source of the installed packages: nothing of them is imported.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

from manta.jobs import http_metrics
from manta.serving.forwarding import gateway_metrics
from manta.serving.telemetry import metrics

SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}


def ours() -> set[str]:
    page = http_metrics.text({}, at_work=True)
    queue = set(re.findall(r"^# TYPE (\S+)", page, re.MULTILINE))
    return {one.exported for one in metrics.ALL} | queue


@functools.cache
def all_of_them() -> set[str]:
    """Everything that a scrape may hold; `up` is Prometheus' own."""
    ray, vllm = folder("ray"), folder("vllm")
    files = [*(ray / "serve/_private").glob("*.py"), vllm / "v1/metrics/loggers.py"]
    files.append(ray / "dashboard/modules/reporter/reporter_agent.py")
    gateway = {one.exported for one in gateway_metrics.ALL}
    return {"up"} | ours() | gateway | {name for file in files for name in defined(file)}


def folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


def defined(file: Path) -> Iterator[str]:
    """As Ray exports them: `ray_` in front, and what Prometheus appends to each kind."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call) and (kind := _kind(node.func)) and (name := _name(node)):
            plain = re.sub(r"[^a-zA-Z0-9_]", "_", name)
            yield from (f"ray_{plain}{suffix}" for suffix in SUFFIXES[kind])


def _kind(function: ast.expr) -> str | None:
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    found = re.fullmatch(r"_?(counter|gauge|histogram)(_cls)?", name.lower())
    return found.group(1) if found else None


def _name(call: ast.Call) -> str | None:
    given = [word.value for word in call.keywords if word.arg == "name"] or call.args[:1]
    value = given[0].value if given and isinstance(given[0], ast.Constant) else None
    return value if isinstance(value, str) else None
