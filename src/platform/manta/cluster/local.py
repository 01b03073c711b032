"""A Ray cluster on this machine: planned as a value, started, watched until ready, ended whole."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import psutil

from manta import storage
from manta.cluster import credentials, dashboard, haproxy, processes, record
from manta.cluster.haproxy import Https
from manta.cluster.ports import LOOPBACK, Ports, require_free
from manta.cluster.record import ClusterRecord
from manta.errors import InputError, MantaError

MIN_LOGICAL_CPUS = 8
"""Ray Data's LLM stages are actors of one CPU each and stall for ever on fewer."""

MAX_OBJECT_STORE_BYTES = 2 * 2**30
"""Default limit; Ray's own default, 30 % of memory, is too much beside a model."""

MAX_TEMP_DIR_LENGTH = 34  # HAProxy's socket lies below it: 56 for the node's id, 17 for its name
"""Characters; Ray appends up to 67 for its unix sockets, which may have 107 in all."""

STOP_GRACE_S = 2.0
POLL_S = 0.1

# What a shell may have left over from another cluster and would mislead this one.
UNSET = (
    "RAY_ADDRESS",
    "RAY_API_SERVER_ADDRESS",
    "RAY_DASHBOARD_ADDRESS",
    "RAY_AUTH_TOKEN",
    "RAY_REDIS_ADDRESS",
    "RAY_NAMESPACE",
    "RAY_TMPDIR",
    "RAY_START_HOOK",
)


@dataclass(frozen=True, kw_only=True)
class UpOptions:
    """Everything that decides how a cluster starts; looked up or chosen before planning."""

    name: str
    cluster_id: str
    ports: Ports
    num_cpus: int
    """Logical: how much work Ray starts side by side, not cores."""
    object_store_memory_bytes: int
    storage_url: str
    token_path: Path
    temp_dir: Path
    log_path: Path
    haproxy: str | None
    """The program in front of Serve; None leaves it to Serve's own proxy, which is slower."""
    https: Https | None = None
    """Where it speaks TLS as well."""
    inherited: dict[str, str]
    """The environment `manta up` runs in; it wins over our defaults, not over our decisions."""


@dataclass(frozen=True, kw_only=True)
class UpPlan:
    """The command that starts the cluster, and the record of it that will be kept."""

    argv: tuple[str, ...]
    environment: dict[str, str]
    """Set for the cluster, on top of the inherited environment less `unset`."""
    unset: tuple[str, ...] = UNSET
    log_path: Path
    ports: Ports
    haproxy: str | None
    https: Https | None
    record: ClusterRecord

    def command(self) -> str:
        """The plain command line that a shell would run."""
        unset = [word for name in self.unset for word in ("-u", name)]
        assignments = [f"{name}={value}" for name, value in self.environment.items()]
        return shlex.join(["env", *unset, *assignments, *self.argv])


def options_here(
    name: str,
    ports: Ports,
    *,
    num_cpus: int | None = None,
    object_store_memory_bytes: int | None = None,
    https: Https | None = None,
) -> UpOptions:
    """Options for this machine: looks at its cores, memory and environment, and draws an id."""
    cluster_id = secrets.token_hex(6)
    memory_bytes = psutil.virtual_memory().total
    return UpOptions(
        name=name,
        cluster_id=cluster_id,
        ports=ports,
        num_cpus=num_cpus or max(MIN_LOGICAL_CPUS, os.cpu_count() or 1),
        object_store_memory_bytes=object_store_memory_bytes
        or min(MAX_OBJECT_STORE_BYTES, memory_bytes // 8),
        storage_url=storage.root(),
        token_path=credentials.token_path(name),
        temp_dir=Path(tempfile.gettempdir(), f"manta-{cluster_id}"),
        log_path=record.path(name).with_name("ray-start.log"),
        haproxy=haproxy.binary(),
        https=https,
        inherited=dict(os.environ),
    )


def plan_up(options: UpOptions) -> UpPlan:
    """What `manta up` will start. Pure. Raises InputError for a path that Ray cannot use."""
    if len(str(options.temp_dir)) > MAX_TEMP_DIR_LENGTH:
        raise InputError(
            f"{options.temp_dir}: too long for Ray's sockets",
            f"set TMPDIR to a folder such that this has {MAX_TEMP_DIR_LENGTH} characters at most",
        )
    environment = _environment(options)
    haproxy.require_on(options.https, environment)
    return UpPlan(
        argv=_argv(options),
        environment=environment,
        log_path=options.log_path,
        ports=options.ports,
        haproxy=options.haproxy,
        https=options.https,
        record=_record(options),
    )


def _argv(options: UpOptions) -> tuple[str, ...]:
    ports = options.ports
    return (
        *("ray", "start", "--head", "--block"),
        f"--node-ip-address={LOOPBACK}",
        f"--port={ports.gcs}",
        f"--dashboard-host={LOOPBACK}",
        f"--dashboard-port={ports.dashboard}",
        f"--dashboard-agent-listen-port={ports.agent}",
        f"--ray-client-server-port={ports.ray_client}",
        # 0: each worker lets the system pick. Ray's default range would be handed out twice by
        # two clusters side by side.
        *("--min-worker-port=0", "--max-worker-port=0"),
        f"--num-cpus={options.num_cpus}",
        f"--object-store-memory={options.object_store_memory_bytes}",
        f"--temp-dir={_ray_temp_dir(options.temp_dir)}",
        "--disable-usage-stats",
    )


def _ray_temp_dir(temp_dir: Path) -> Path:
    """Ray opens its folder to every user, so it gets one inside a folder that keeps them out."""
    return temp_dir / "r"


def _haproxy_folder(temp_dir: Path) -> Path:
    return temp_dir / "h"


def _environment(options: UpOptions) -> dict[str, str]:
    ports, inherited = options.ports, options.inherited
    defaults = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; vLLM takes a large share of memory otherwise
        "VLLM_NO_USAGE_STATS": "1",
        "MANTA_ENGINE_CORES": "few",  # for engines on CPUs, see serving/engine/engine_cores.py
        # Ray starts a worker for each logical CPU when a job connects: seconds on two cores, and
        # wasted, since a job's own runtime_env needs workers of its own.
        "RAY_prestart_worker_first_driver": "0",
        "PYTHONUNBUFFERED": "1",  # so that a job's log shows each line when it is printed
    }
    decisions = {
        processes.CLUSTER_ID_VARIABLE: options.cluster_id,
        "MANTA_CLUSTER": options.name,
        "MANTA_SERVE_URL": f"http://{LOOPBACK}:{ports.serve}",
        storage.ROOT_VARIABLE: options.storage_url,
        # Jobs say `python`: the one that this Ray is installed in, active or not.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), inherited.get("PATH", "")]),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(options.token_path),
        record.LOOPBACK_VARIABLE: "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "TMPDIR": str(options.temp_dir),  # what jobs leave there goes with the cluster
        "SPT_NOENV": "1",  # setproctitle leaves the environment readable, see cluster/processes.py
        "AUTOSCALER_METRIC_PORT": str(ports.autoscaler_metrics),
        "DASHBOARD_METRIC_PORT": str(ports.dashboard_metrics),
        "RAY_SERVE_DEFAULT_HTTP_HOST": LOOPBACK,
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(ports.serve_fallback),
    }
    if options.haproxy:
        folder = _haproxy_folder(options.temp_dir)
        defaults |= haproxy.SWITCHES
        decisions |= haproxy.environment(folder, ports.haproxy_metrics, ports.haproxy_stats)
    return {name: inherited.get(name, value) for name, value in defaults.items()} | decisions


def _record(options: UpOptions) -> ClusterRecord:
    ports = options.ports
    return ClusterRecord(
        name=options.name,
        cluster_id=options.cluster_id,
        pid=0,
        gcs_address=f"{LOOPBACK}:{ports.gcs}",
        dashboard_url=f"http://{LOOPBACK}:{ports.dashboard}",
        serve_url=f"http://{LOOPBACK}:{ports.serve}",
        token_path=str(options.token_path),
        temp_dir=str(options.temp_dir),
        storage_url=options.storage_url,
        started_at="",
    )


def execute(
    plan: UpPlan, timeout_s: float, tell: Callable[[str], None] = lambda text: None
) -> ClusterRecord:
    """Start the cluster and return when it takes jobs. On any failure nothing is left running.

    Args:
        plan: what to start.
        timeout_s: for everything together.
        tell: called with a few words at each step.

    Raises:
        InputError: it is up already, or a port is taken.
        MantaError: Ray did not start; the message carries the end of its log.
    """
    with lock(plan.record.name):
        _require_absent(plan.record.name)
        require_free(plan.ports)
        haproxy.require_free(plan.https)
        try:
            return _start(plan, time.monotonic() + timeout_s, tell)
        except BaseException:  # Ctrl-C too
            _clean(plan.record)
            raise


def _start(plan: UpPlan, deadline: float, tell: Callable[[str], None]) -> ClusterRecord:
    tell("Starting Ray")
    credentials.ensure_token(plan.record.name)
    folder = Path(plan.record.temp_dir)
    folder.mkdir(mode=0o700, parents=True)
    if plan.haproxy:
        haproxy.write_script(_haproxy_folder(folder), plan.haproxy, plan.https)
    holder = _spawn(plan)
    started = replace(
        plan.record, pid=holder.pid, started_at=datetime.now(UTC).isoformat(timespec="seconds")
    )
    # Before it is ready, so that `manta down` can end it should this process be killed.
    record.save(started)
    base, agent = started.dashboard_url, f"http://{LOOPBACK}:{plan.ports.agent}"
    waits = {
        "dashboard": f"{base}/api/version",
        "job API": f"{base}/api/jobs/",
        "job agent": f"{agent}/api/local_raylet_healthz",
    }
    for what, url in waits.items():
        tell(f"Waiting for the {what}")
        _wait_for(what, url, holder, plan, deadline)
    tell("Starting Serve")
    _start_serve(started, plan.ports, deadline)
    return started


def _spawn(plan: UpPlan) -> subprocess.Popen[bytes]:
    environment = {name: value for name, value in os.environ.items() if name not in plan.unset}
    plan.log_path.parent.mkdir(parents=True, exist_ok=True)
    with plan.log_path.open("wb") as log:
        return subprocess.Popen(
            plan.argv,
            executable=str(Path(sys.executable).parent / plan.argv[0]),
            env=environment | plan.environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",  # not the caller's folder, from which workers would import
            start_new_session=True,  # outlives the terminal, and does not see its Ctrl-C
        )


def _wait_for(
    what: str, url: str, holder: subprocess.Popen[bytes], plan: UpPlan, deadline: float
) -> None:
    while not dashboard.is_up(url, plan.record.token_path):
        if holder.poll() is not None:
            raise MantaError(
                f"Ray ended while starting (exit code {holder.returncode})", _tail(plan)
            )
        if time.monotonic() > deadline:
            raise MantaError(f"the {what} was not ready in time", _tail(plan))
        time.sleep(POLL_S)


def _start_serve(cluster: ClusterRecord, ports: Ports, deadline: float) -> None:
    # A Serve config without http_options listens on 0.0.0.0:8000, and nothing in the environment
    # changes that. Serve keeps the options that it first started with, so they are set here.
    body = {
        "applications": [],
        "proxy_location": "EveryNode",
        "http_options": {"host": LOOPBACK, "port": ports.serve},
        "grpc_options": {"port": ports.serve_grpc},
    }
    timeout_s = max(1.0, deadline - time.monotonic())
    dashboard.put(cluster, "/api/serve/applications/", body, timeout_s)


def _tail(plan: UpPlan, num_lines: int = 20) -> str:
    lines = plan.log_path.read_text(errors="replace").splitlines()[-num_lines:]
    logs = _ray_temp_dir(Path(plan.record.temp_dir)) / "session_latest" / "logs"
    for file in ("dashboard.log", "gcs_server.out", "raylet.out"):
        if (logs / file).exists():
            lines += [f"-- {file}"]
            lines += (logs / file).read_text(errors="replace").splitlines()[-num_lines // 4 :]
    return "the end of Ray's logs:\n" + "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class Health:
    """Whether a recorded cluster lives: its processes, and its API."""

    num_processes: int
    holder_alive: bool
    answers: bool

    @property
    def state(self) -> str:
        """`up`, `not answering` (alive but silent) or `dead` (its holder ended)."""
        if not self.holder_alive:
            return "dead"
        return "up" if self.answers else "not answering"


def health(cluster: ClusterRecord) -> Health:
    """Look at the processes and ask the job API once."""
    pids = [process.pid for process in processes.members(cluster.cluster_id)]
    holder_alive = cluster.pid in pids
    return Health(
        num_processes=len(pids),
        holder_alive=holder_alive,
        answers=holder_alive
        and dashboard.is_up(f"{cluster.dashboard_url}/api/jobs/", cluster.token_path),
    )


def _require_absent(name: str) -> None:
    if not record.path(name).exists():
        return
    existing = record.load(name)
    if health(existing).holder_alive:
        raise InputError(
            f"cluster `{name}` is already up: dashboard {existing.dashboard_url}, "
            f"since {existing.started_at}",
            "see `manta status`; `manta down` ends it; `--name` and `--ports auto` start another",
        )
    _clean(existing)  # a reboot or kill -9 left it


def down(name: str, *, keep_logs: bool = False) -> ClusterRecord | None:
    """End cluster `name` with every process of it; None if there is none. Idempotent.

    Raises MantaError if a process cannot be ended.
    """
    if not record.path(name).parent.exists():
        return None
    with lock(name):
        if not record.path(name).exists():
            return None
        existing = record.load(name)
        _clean(existing, keep_logs=keep_logs)
        return existing


def _clean(cluster: ClusterRecord, *, keep_logs: bool = False) -> None:
    left = processes.end(cluster.cluster_id, STOP_GRACE_S)
    if left:
        pids = ", ".join(str(process.pid) for process in left)
        raise MantaError(f"processes {pids} of cluster `{cluster.name}` cannot be ended")
    if not keep_logs:
        shutil.rmtree(cluster.temp_dir, ignore_errors=True)
    record.forget(cluster.name)


@contextlib.contextmanager
def lock(name: str) -> Iterator[None]:
    """One `up` or `down` of a cluster at a time. Raises InputError if another is at work."""
    path = record.path(name).with_name("lock")
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"another `manta up` or `manta down` of cluster `{name}` is at work",
                "wait until it is done",
            ) from None
        yield
