"""Rules over the versions that a cluster YAML names, against the lock that is tested together."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from manta.check.cluster_shape import spec
from manta.check.rules import Fault, File, Project, rule
from manta.spec.loading import Path_

PYTHONS = ("3.11", "3.12")
"""Python versions that the lock is tested with."""

_TAG = re.compile(r"(?P<name>rayproject/ray(-\w+)?)(:(?P<tag>[\w.-]+))?(@sha256:\w+)?$")
_VERSION = re.compile(r"^(?P<ray>\d+\.\d+\.\d+)(\.[0-9a-f]+)?")
_PYTHON = re.compile(r"-py(?P<major>3)(?P<minor>\d+)")
_PIP = re.compile(r"\bray(\[[\w,-]+\])?\s*==\s*(?P<ray>\d+\.\d+(\.\d+)?)")
_COMMANDS = (
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
)


@functools.cache
def locked_ray() -> str:
    """Ray's version in requirements/ of the working directory, else of this installation."""
    for lock in sorted(Path("requirements").glob("*.txt")):
        if match := re.search(r"^ray==([\d.]+)", lock.read_text(errors="replace"), re.MULTILINE):
            return match[1]
    return metadata.version("ray")


def _images(file: File) -> Iterator[tuple[Path_, str]]:
    cluster = spec(file)
    for key in ("image", "head_image", "worker_image"):
        if image := getattr(cluster.docker, key):
            yield ("docker", key), image
    for name, node_type in cluster.node_types.items():
        if node_type.docker and node_type.docker.worker_image:
            path = ("available_node_types", name, "docker", "worker_image")
            yield path, node_type.docker.worker_image


def _versions(file: File) -> Iterator[tuple[Path_, str]]:
    """Every Ray version that the file names, with its path."""
    for path, image in _images(file):
        match = _TAG.match(image)
        if match and (version := _VERSION.match(match["tag"] or "")):
            yield path, version["ray"]
    for key in _COMMANDS:
        for i, command in enumerate(getattr(spec(file), key) or ()):
            for match in _PIP.finditer(command):
                yield (key, i), match["ray"]


@rule("cluster-ray-version", "warning", "cluster")
def ray_version(file: File, project: Project) -> Iterator[Fault]:
    """Clients, jobs and nodes of different Ray versions refuse each other."""
    for path, version in _versions(file):
        if version != locked_ray():
            what = f"Ray {version} here, {locked_ray()} in the lock"
            yield Fault(path, what, f"write {locked_ray()}")


@rule("cluster-versions-differ", "error", "cluster")
def versions_differ(file: File, project: Project) -> Iterator[Fault]:
    """Nodes of one cluster must run one Ray version; the others are turned away."""
    images = [(path, v) for path, v in _versions(file) if "image" in str(path[-1])]
    for path, version in images[1:]:
        if version != images[0][1]:
            what = f"Ray {version} here, {images[0][1]} in another image of this file"
            yield Fault(path, what, "use one version")


@rule("cluster-python-version", "warning", "cluster")
def python_version(file: File, project: Project) -> Iterator[Fault]:
    """Pickled functions do not travel between Python versions; the lock is made for its own."""
    for path, image in _images(file):
        match = _TAG.match(image)
        if match and (python := _PYTHON.search(match["tag"] or "")):
            version = f"{python['major']}.{python['minor']}"
            if version not in PYTHONS:
                what = f"Python {version} here, {' or '.join(PYTHONS)} in the lock"
                yield Fault(path, what, f"write -py{PYTHONS[0].replace('.', '')}")


@rule("cluster-image-floating", "warning", "cluster")
def image_floating(file: File, project: Project) -> Iterator[Fault]:
    """A tag that moves gives tomorrow's nodes another Ray than today's."""
    for path, image in _images(file):
        tag = image.rsplit("/", 1)[-1].partition(":")[2]
        if "@sha256:" not in image and (not tag or re.match(r"(latest|nightly|master)\b", tag)):
            fix = f"pin it, e.g. rayproject/ray:{locked_ray()}-py311-gpu"
            yield Fault(path, f"image `{image}` has no fixed version", fix)
