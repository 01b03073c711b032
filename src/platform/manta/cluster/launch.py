"""Executes a launch: Ray's launcher driven, every worker awaited, whatever failed named."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from manta import storage
from manta.cluster import (
    cloud_errors,
    credentials,
    dashboard,
    hosts,
    joining,
    landing,
    launcher,
    ports,
    processes,
    provider,
    record,
    ssh,
    tls,
    tunnel,
)
from manta.cluster.launcher import LaunchOptions, LaunchPlan
from manta.cluster.local import lock
from manta.cluster.record import ClusterRecord
from manta.errors import InputError, MantaError

POLL_S = 0.5
_STEP = re.compile(r"\[(\d)(?:-\d)?/7\] (.+)")
_STARTING = ("Acquiring an up-to-date head node", "Setting up head node")
"""What `ray up` says before it asks the provider for a machine, or sets one up."""
_PREFIX = re.compile(r"^\S+ \S+\s+\w+ [\w.]+:\d+ -- ")
Tell = Callable[[str], None]


def options_here(
    name: str, source: Path, config_passthrough: Mapping[str, Any], *, with_tls: bool
) -> LaunchOptions:
    """Options for a cluster: those of an earlier start, if its record is there.

    Raises InputError if the name belongs to another kind of cluster, or a host to another cluster.
    """
    earlier = record.load(name) if record.path(name).exists() else None
    if earlier and earlier.launched is None:
        raise InputError(f"cluster `{name}` is one on this machine", "choose another with --name")
    cluster_id = earlier.cluster_id if earlier else secrets.token_hex(6)
    dashboard_port, serve_port, gcs_port = (
        [
            int(url.rpartition(":")[2])
            for url in (earlier.dashboard_url, earlier.serve_url, earlier.gcs_address)
        ]
        if earlier
        else ports.free(3)
    )
    return LaunchOptions(
        name=name,
        source=source.absolute(),
        config_passthrough=config_passthrough,
        folder=record.path(name).parent,
        cluster_id=cluster_id,
        dashboard_port=dashboard_port,
        serve_port=serve_port,
        gcs_port=gcs_port,
        storage_url=storage.root(),
        token_path=credentials.token_path(name),
        temp_dir=Path("/tmp", f"manta-{cluster_id}"),  # short: ssh's socket has 104 characters
        worker_resources=launcher.given_resources(config_passthrough),
        tls=with_tls or bool(earlier and earlier.launched and earlier.launched.tls),
        new_keys=with_tls,
        earlier=earlier,
    )


def with_resources(options: LaunchOptions) -> LaunchOptions:
    """Options with what the on-premise workers hold, asked over SSH if the file does not say.

    Only a cluster that may grow needs it; hosts that do not answer are left out.
    """
    cluster = launcher.plan_launch(options).record
    config = options.config_passthrough
    assert cluster.launched
    may_grow = config.get("max_workers", 0) > cluster.launched.num_min_workers
    if (
        cluster.launched.provider != launcher.ON_PREMISE
        or options.worker_resources
        or not may_grow
    ):
        return options
    options.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return replace(options, worker_resources=hosts.resources(cluster))


def require_hosts_free(plan: LaunchPlan) -> None:
    """Raise InputError if a host belongs to another cluster: Ray would end that one."""
    launched = plan.record.launched
    assert launched
    if launched.provider != launcher.ON_PREMISE:
        return
    mine = {launched.access.head, *launched.hosts}
    for other in record.load_all():
        if other.name != plan.record.name and other.launched:
            shared = mine & {other.launched.access.head, *other.launched.hosts} - {""}
            if shared and other.launched.provider == launcher.ON_PREMISE:
                raise InputError(
                    f"host {min(shared)} belongs to cluster `{other.name}`",
                    f"end that one with `manta down --name {other.name}`, or use other hosts",
                )


def execute(
    plan: LaunchPlan, timeout_s: float, tell: Tell = lambda text: None, *, keep: bool = False
) -> ClusterRecord:
    """Launch the cluster and return when its minimum workers have joined. Idempotent.

    On failure nothing is left running, unless the cluster was up before or `keep` is set. Ctrl-C
    leaves everything as it is: the record is there, and `up` goes on where it was.

    Args:
        plan: what to launch.
        timeout_s: for everything together.
        tell: called with a few words at each step.
        keep: leave a failed start as it is, to look at it.

    Raises:
        InputError: a host belongs to another cluster, or another `up` or `down` is at work.
        MantaError: the step that failed, on which host, with that host's own log.
    """
    require_hosts_free(plan)
    with lock(plan.record.name):
        restart = _changes(plan)
        cluster = _prepare(plan)
        was_up = bool(cluster.launched and cluster.launched.is_up)
        try:
            return _launch(cluster, time.monotonic() + timeout_s, tell, restart=restart)
        except MantaError as error:
            if was_up or keep:
                raise
            tell("Ending what was started")
            is_first = not plan.record.started_at
            raise _after_ending(cluster.name, error, is_first=is_first) from None


def _changes(plan: LaunchPlan) -> bool:
    """Whether Ray has to be started anew: not if the same file brought the cluster up before."""
    assert plan.record.launched
    config = Path(plan.record.launched.config)
    same = config.exists() and config.read_text() == plan.config_text
    return not (same and plan.record.launched.is_up) or plan.new_keys


def _prepare(plan: LaunchPlan) -> ClusterRecord:
    """Files and record first, so that a lost terminal loses nothing."""
    assert plan.record.launched
    credentials.ensure_token(plan.record.name)
    if plan.new_keys:
        tls.new_keys(Path(plan.record.launched.config).parent)
    config = Path(plan.record.launched.config)
    partial = config.with_suffix(".partial")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(plan.config_text)
    partial.rename(config)
    started = plan.record.started_at or datetime.now(UTC).isoformat(timespec="seconds")
    old = record.load(plan.record.name) if record.path(plan.record.name).exists() else None
    cluster = replace(plan.record, started_at=started, pid=old.pid if old else 0)
    record.save(cluster)
    return cluster


def _launch(
    cluster: ClusterRecord, deadline: float, tell: Tell, *, restart: bool
) -> ClusterRecord:
    cluster = _ray_up(cluster, deadline, tell, restart=restart)
    cluster = _with_access(cluster)
    record.save(cluster)
    tell("Opening the tunnel")
    tunnel.close(cluster)  # one that is left may end at a head that is gone
    cluster = tunnel.ensure(cluster)
    _wait_for_api(cluster, deadline, tell)
    joining.wait(cluster, deadline, tell)
    tell("Starting Serve")
    _start_serve(cluster, deadline)
    assert cluster.launched
    cluster = replace(cluster, launched=replace(cluster.launched, is_up=True))
    record.save(cluster)
    return cluster


def _ray_up(
    cluster: ClusterRecord, deadline: float, tell: Tell, *, restart: bool
) -> ClusterRecord:
    """Run `ray up`, or wait for the one that a lost terminal left running."""
    log = log_path(cluster)
    running = _left_running(cluster)
    if running is None:
        running = _spawn(cluster, log, restart=restart)
        cluster = replace(cluster, pid=running.pid)
        record.save(cluster)
    try:
        code = _follow(running, log, deadline, tell)
    except KeyboardInterrupt:
        _end_group(running.pid)
        raise
    if code == 0 or (code is None and "Useful commands" in _text(log)):
        return cluster
    raise _launcher_failed(cluster, _text(log))


def log_path(cluster: ClusterRecord) -> Path:
    """What `ray up` printed last."""
    assert cluster.launched
    return Path(cluster.launched.config).with_name("ray-up.log")


def _spawn(cluster: ClusterRecord, log: Path, *, restart: bool) -> psutil.Popen:
    words = launcher.ray_words("up", cluster)
    with log.open("wb") as stream:
        return psutil.Popen(
            words if restart else [*words, "--no-restart"],  # Ray restarts the head otherwise
            executable=launcher.ray_binary(),
            env=provider.environment(log.parent),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            start_new_session=True,  # a lost terminal must not stop it half-way
        )


def _left_running(cluster: ClusterRecord) -> psutil.Process | None:
    assert cluster.launched
    try:
        process = psutil.Process(cluster.pid)
        is_ours = cluster.pid > 0 and cluster.launched.config in process.cmdline()
    except psutil.Error:
        return None
    return process if is_ours else None


def _follow(process: psutil.Process, log: Path, deadline: float, tell: Tell) -> int | None:
    """Wait for `ray up`, telling its steps; its exit code, None if it is not our child."""
    told = ""
    while True:
        try:
            code: int | None = process.wait(POLL_S)
            return code
        except psutil.TimeoutExpired:
            if not processes.is_alive(process):
                return None
        if (step := _step(_text(log))) != told:
            told = step
            tell(f"Head: {step}")
        if time.monotonic() > deadline:
            _end_group(process.pid)
            return -1


def _end_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGTERM)


def _step(text: str) -> str:
    """The last step that `ray up` said it began."""
    found = _STEP.findall(text)
    return f"step {found[-1][0]} of 7, {found[-1][1].strip()}" if found else "asking the provider"


def _launcher_failed(cluster: ClusterRecord, text: str) -> MantaError:
    assert cluster.launched
    head = cluster.launched.access.head or "not there yet"
    lines = [_PREFIX.sub("", line) for line in text.splitlines() if "Full command is" not in line]
    if not text.strip():
        return MantaError(
            f"the head ({head}) was not started: `ray up` had said nothing when the time was up",
            "give it more time with --timeout-s",
        )
    if not _STEP.search(text):  # no machine yet: it is the provider that said no
        return cloud_errors.explained("the head was not started", "\n".join(lines))
    if "wait_ready timeout exceeded" in text:  # Ray's words for it come with a traceback
        return MantaError(
            f"the head ({head}) failed at {_step(text)}: nobody was let in all the time",
            "check address, user, key, and whether firewall or security group admit this machine; "
            f"everything that was said is in {log_path(cluster)}",
        )
    said = "\n".join(f"  {line.strip()}" for line in lines[-15:] if line.strip())
    return MantaError(
        f"the head ({head}) failed at {_step(text)}; the end of its log:\n{said}",
        f"everything that it said is in {log_path(cluster)}",
    )


def _with_access(cluster: ClusterRecord) -> ClusterRecord:
    """The head's address, and the key that Ray may have made, from the provider."""
    assert cluster.launched
    if cluster.launched.provider == launcher.ON_PREMISE and cluster.launched.access.head:
        return cluster
    access = provider.look(cluster).access
    return replace(cluster, launched=replace(cluster.launched, access=access))


def _wait_for_api(cluster: ClusterRecord, deadline: float, tell: Tell) -> None:
    tell("Waiting for the job API")
    while not dashboard.is_up(f"{cluster.dashboard_url}/api/jobs/", cluster.token_path):
        if time.monotonic() > deadline:
            assert cluster.launched
            logs = f"{cluster.launched.ray_temp_dir}/session_latest/logs"
            tail = f"tail -n 8 {logs}/dashboard.log {logs}/gcs_server.out 2>&1"
            said = ssh.on_head(cluster, ssh.in_ray(cluster, tail))
            raise MantaError(
                f"the head ({cluster.launched.access.head}) runs and its job API does not "
                f"answer; the end of its logs:\n{said.out}{said.err}"
            )
        time.sleep(POLL_S)


def _start_serve(cluster: ClusterRecord, deadline: float) -> None:
    # As cluster/local.py: Serve would listen on every interface, and keeps what it starts with.
    assert cluster.launched
    body = {
        "applications": [],
        "proxy_location": "EveryNode",
        "http_options": {"host": launcher.LOOPBACK, "port": cluster.launched.serve_port},
    }
    if not dashboard.applications(cluster):
        timeout_s = max(10.0, deadline - time.monotonic())
        dashboard.put(cluster, "/api/serve/applications/", body, timeout_s)


def _after_ending(name: str, error: MantaError, *, is_first: bool) -> MantaError:
    """The error of a failed start, and what became of what it had started."""
    cluster = record.load(name)
    if is_first and not any(words in _text(log_path(cluster)) for words in _STARTING):
        landing.forget(cluster)
        return MantaError(f"{error}\nNothing was started.")
    try:
        landing.execute(cluster)
    except MantaError as left:
        return MantaError(f"{error}\nand ending it failed too: {left}")
    return MantaError(f"{error}\nNothing of it is left running.")


def _text(log: Path) -> str:
    return log.read_text(errors="replace") if log.exists() else ""
