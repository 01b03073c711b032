"""What `manta up FILE.yaml` gives to Ray's launcher: the user's file and what closes it. Pure."""

from __future__ import annotations

import copy
import json
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from manta import storage
from manta.cluster import tls
from manta.cluster.processes import CLUSTER_ID_VARIABLE
from manta.cluster.record import Access, ClusterRecord, Launched
from manta.errors import InputError

TOKEN_MOUNT = "~/.ray/auth_token"
"""Where Ray looks for a token by itself, so that plain `ray` commands work on the hosts too."""

TLS_MOUNT = "~/.manta-tls"
LOOPBACK = "127.0.0.1"
ON_PREMISE = "local"
ON_PREMISE_TYPE = "local.cluster.node"
HEAD_TYPE = "head"
START = ("head_start_ray_commands", "worker_start_ray_commands")
STATE_FOLDER = "${RAY_TMPDIR:-${TMPDIR:-/tmp}}/ray"
"""On a host, as its shell sees it: where Ray's on-premise provider keeps its state."""
_RAY_START = re.compile(r"\bray(?:\.sh)?\s+start\b")


@dataclass(frozen=True, kw_only=True)
class LaunchOptions:
    """Everything that decides what is launched; looked up or chosen before planning."""

    name: str
    source: Path
    config_passthrough: Mapping[str, Any]
    """The user's cluster YAML, as read."""
    folder: Path
    """Manta's folder for this cluster."""
    cluster_id: str
    dashboard_port: int
    """On this machine, as are the two below: the tunnel's ends."""
    serve_port: int
    gcs_port: int
    storage_url: str
    token_path: Path
    temp_dir: Path
    worker_resources: Mapping[str, float] = field(default_factory=dict)
    """What an on-premise worker offers, in Ray's units; empty if not known."""
    tls: bool = False
    new_keys: bool = False
    """Make a new CA, also where there is one."""
    prices: tuple[Path, ...] = ()
    earlier: ClusterRecord | None = None
    """The record of an earlier start of the same cluster."""


@dataclass(frozen=True, kw_only=True)
class LaunchPlan:
    """What will be given to Ray's launcher, and the record of it that will be kept."""

    config_text: str
    """The derived cluster YAML."""
    added: tuple[str, ...]
    """What was changed in the user's file and why, one line each."""
    record: ClusterRecord
    new_keys: bool = False

    def command(self) -> str:
        """The plain command line that a shell would run."""
        return shlex.join(ray_words("up", self.record))


def ray_words(verb: str, record: ClusterRecord) -> list[str]:
    """The `ray up` or `ray down` of this cluster."""
    assert record.launched
    words = ["ray", verb, record.launched.config, "--yes"]
    if verb == "up":
        words += ["--no-config-cache"]  # the cache survives what the file's author changed since
    return [*words, "--log-style", "record", "--log-color", "false"]


def plan_launch(options: LaunchOptions) -> LaunchPlan:
    """What `manta up FILE.yaml` will launch. Pure.

    Raises InputError if the file has nothing to close: no start command for the head.
    """
    config = copy.deepcopy(dict(options.config_passthrough))
    config["cluster_name"] = options.name
    added = [
        *_complete(config, options),
        *_ship_token(config, options),
        *_close(config, options),
        *_leave_nothing(config),
    ]
    return LaunchPlan(
        config_text=yaml.safe_dump(config, sort_keys=False, width=1000),
        added=tuple(added),
        record=_record(config, options),
        new_keys=options.new_keys,
    )


def _complete(config: dict[str, Any], options: LaunchOptions) -> list[str]:
    """Fill in what Ray would fill in later and unseen: commands, on-premise node types."""
    provider = config["provider"]["type"]
    added = []
    for commands in START:
        if commands not in config:
            config[commands] = _defaults(provider).get(commands) or []
            added.append(f"{commands}: Ray's own, which the file leaves out")
    if provider == ON_PREMISE:
        added += _node_types(config, options.worker_resources)
    mounts = config.get("file_mounts") or {}
    # Relative to where `ray up` runs, says Ray; a later command may run elsewhere.
    config["file_mounts"] = {
        to: str(Path(what).expanduser().absolute()) for to, what in mounts.items()
    }
    if key := (config.get("auth") or {}).get("ssh_private_key"):
        config["auth"] = {
            **config["auth"],
            "ssh_private_key": str(Path(key).expanduser().absolute()),
        }
    return added


def _node_types(config: dict[str, Any], resources: Mapping[str, float]) -> list[str]:
    """Give an on-premise head a node type of its own.

    Ray makes one type for all hosts, and its autoscaler v2 counts the head among the minimum
    workers of that type, so that one too few is started; v2 also believes that the type holds
    nothing and never adds a host for demand. A file that names this type counts as prepared
    already (ray/autoscaler/_private/local/config.py, prepare_local).
    """
    prepared = _prepared(config)
    config.clear()
    config.update(prepared)
    workers = config["available_node_types"][ON_PREMISE_TYPE]
    workers["resources"] = dict(resources)
    config["available_node_types"] = {
        HEAD_TYPE: {"node_config": {}, "resources": {}, "min_workers": 0, "max_workers": 0},
        ON_PREMISE_TYPE: workers,
    }
    config["head_node_type"] = HEAD_TYPE
    shown = ", ".join(f"{name} {amount:g}" for name, amount in resources.items()) or "unknown"
    return [
        f"available_node_types: the head apart from the workers ({shown} each), or Ray's "
        "autoscaler starts one worker too few and adds none for demand"
    ]


def _prepared(config: dict[str, Any]) -> dict[str, Any]:
    """An on-premise file as Ray itself completes it."""
    import contextlib
    import io

    from ray.autoscaler._private.util import prepare_config

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        prepared: dict[str, Any] = prepare_config(config)
    return prepared


def _defaults(provider: str) -> dict[str, Any]:
    """The file that Ray fills gaps from, for one provider; empty if it has none."""
    ray = find_spec("ray")
    assert ray
    assert ray.submodule_search_locations
    path = Path(ray.submodule_search_locations[0], "autoscaler", provider, "defaults.yaml")
    found: dict[str, Any] = yaml.safe_load(path.read_text()) if path.exists() else {}
    return found


def _ship_token(config: dict[str, Any], options: LaunchOptions) -> list[str]:
    config["file_mounts"][TOKEN_MOUNT] = str(options.token_path)
    return [f"file_mounts: this cluster's own token to {TOKEN_MOUNT} on every host"]


# An on-premise host that is ended and started within one round of the autoscaler keeps its
# address: Ray waits, for minutes by default, for one to vanish and for the other to appear.
# Starting is a line in a file here: what did not happen in two rounds (5 s each) never will.
ON_PREMISE_PATIENCE = {
    "RAY_AUTOSCALER_RECONCILE_TERMINATING_STATUS_TIMEOUT_S": "15",
    "RAY_AUTOSCALER_RECONCILE_REQUEST_STATUS_TIMEOUT_S": "30",
}


def _close(config: dict[str, Any], options: LaunchOptions) -> list[str]:
    """Token, mode and loopback in every command that starts Ray."""
    environment = _environment(options)
    if config["provider"].get("type") == "local":
        environment |= ON_PREMISE_PATIENCE
    for key in START:
        config[key] = [_started(command, environment, key) for command in config[key]]
    config[START[0]] = [
        _with_head_recorded(command, config["provider"], options.name)
        for command in config[START[0]]
    ]
    if not any(_RAY_START.search(command) for command in config[START[0]]):
        raise InputError(
            f"{options.source}: no `ray start` in head_start_ray_commands",
            "write e.g. `ray start --head --autoscaling-config=~/ray_bootstrap_config.yaml`",
        )
    added = [
        "start commands: RAY_AUTH_MODE=token, the cluster's id, no unauthenticated metrics ports",
        f"ray start --head: dashboard and job API on {LOOPBACK} only, reached through SSH",
    ]
    if options.tls:
        config["file_mounts"][TLS_MOUNT] = str(options.folder / "tls")
        added.append(f"TLS between the hosts: CA and certificate in {TLS_MOUNT} on every host")
    return added


def _environment(options: LaunchOptions) -> dict[str, str]:
    """Set in front of each `ray start`; what the file's own command exports later wins."""
    variables = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": TOKEN_MOUNT,
        CLUSTER_ID_VARIABLE: options.cluster_id,
        "SPT_NOENV": "1",  # setproctitle leaves the environment readable, see cluster/processes.py
        "MANTA_CLUSTER": options.name,
        "MANTA_SERVE_URL": f"http://{LOOPBACK}:8000",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONUNBUFFERED": "1",
        "RAY_SERVE_DEFAULT_HTTP_HOST": LOOPBACK,
        # Metrics ports know no token and listen on every interface; -1 cannot be bound.
        "RAY_enable_metrics_collection": "0",
        "AUTOSCALER_METRIC_PORT": "-1",
        "DASHBOARD_METRIC_PORT": "-1",
    }
    if not storage.is_local(options.storage_url):
        variables[storage.ROOT_VARIABLE] = options.storage_url
    if options.tls:
        variables |= {
            "RAY_USE_TLS": "1",
            "RAY_TLS_SERVER_CERT": f"{TLS_MOUNT}/node.crt",
            "RAY_TLS_SERVER_KEY": f"{TLS_MOUNT}/node.key",
            "RAY_TLS_CA_CERT": f"{TLS_MOUNT}/ca.crt",
        }
    return variables


def _started(command: str, environment: Mapping[str, str], key: str) -> str:
    if not _RAY_START.search(command):
        return command
    if key == START[0]:
        command = re.sub(r"\s--dashboard-host[= ]\S+", "", command)
        command = _RAY_START.sub(lambda m: f"{m.group()} --dashboard-host={LOOPBACK}", command, 1)
    # A leading tilde is expanded by the shell only outside quotes.
    exports = " ".join(
        f"{name}={value if value.startswith('~') else shlex.quote(value)}"
        for name, value in environment.items()
    )
    first = f"{tls.make_certificate(TLS_MOUNT)}; " if "RAY_USE_TLS" in environment else ""
    return f"unset RAY_ADDRESS RAY_AUTH_TOKEN; {first}export {exports}; {command}"


def _with_head_recorded(command: str, provider: Mapping[str, Any], name: str) -> str:
    """Tell the autoscaler on an on-premise head that the head is there.

    It reads the provider's state file, which `ray up` writes where it runs and not on the head.
    v1 added the head (record_local_head_state_if_needed), v2 does not: it finds the head missing,
    takes it for ended, and from then on starts no worker any more. The file also replaces what
    an earlier cluster of this name may have left.
    """
    if "head_ip" not in provider or not _RAY_START.search(command):
        return command
    tags = {
        "ray-node-type": "head",
        "ray-user-node-type": HEAD_TYPE,
        "ray-node-name": f"ray-{name}-head",
        "ray-node-status": "up-to-date",
    }
    state = json.dumps({str(provider["head_ip"]): {"tags": tags, "state": "running"}})
    return (
        f"mkdir -p {STATE_FOLDER} && echo {shlex.quote(state)} "
        f"> {STATE_FOLDER}/{state_file(name)}; {command}"
    )


def state_file(name: str) -> str:
    """Name of the file in which Ray's on-premise provider keeps its state."""
    return f"cluster-{name}.state"


def _leave_nothing(config: dict[str, Any]) -> list[str]:
    provider = config["provider"]
    if (
        provider["type"] not in ("aws", "azure", "gcp", "aliyun")
        or "cache_stopped_nodes" in provider
    ):
        return []
    config["provider"] = {**provider, "cache_stopped_nodes": False}
    return [
        "provider.cache_stopped_nodes: false; stopped machines would keep disks that cost money"
    ]


def _record(config: Mapping[str, Any], options: LaunchOptions) -> ClusterRecord:
    provider, auth = config["provider"], config.get("auth") or {}
    head = " ".join(config[START[0]])
    earlier = options.earlier.launched if options.earlier else None
    return ClusterRecord(
        name=options.name,
        cluster_id=options.cluster_id,
        pid=0,
        gcs_address=f"{LOOPBACK}:{options.gcs_port}",
        dashboard_url=f"http://{LOOPBACK}:{options.dashboard_port}",
        serve_url=f"http://{LOOPBACK}:{options.serve_port}",
        token_path=str(options.token_path),
        temp_dir=str(options.temp_dir),
        storage_url=options.storage_url,
        started_at=options.earlier.started_at if options.earlier else "",
        launched=Launched(
            provider=provider["type"],
            source=str(options.source),
            config=str(options.folder / "cluster.yaml"),
            is_up=bool(earlier and earlier.is_up),
            access=Access(
                head=str(provider.get("external_head_ip") or provider.get("head_ip") or "")
                or (earlier.access.head if earlier else ""),
                user=str(auth.get("ssh_user") or (earlier.access.user if earlier else "")),
                key=auth.get("ssh_private_key") or (earlier.access.key if earlier else None),
                proxy_command=auth.get("ssh_proxy_command"),
            ),
            hosts=tuple(map(str, provider.get("worker_ips") or ())),
            container=(config.get("docker") or {}).get("container_name") or None,
            num_min_workers=_num_min_workers(config),
            dashboard_port=_port(head, "dashboard-port", 8265),
            gcs_port=_port(head, "port", 6379),
            ray_temp_dir=_option(head, "temp-dir") or "/tmp/ray",
            tls=options.tls,
            prices=tuple(str(path.absolute()) for path in options.prices),
        ),
    )


def _num_min_workers(config: Mapping[str, Any]) -> int:
    types = config.get("available_node_types") or {}
    return sum(int(each.get("min_workers") or 0) for each in types.values())


def _option(command: str, name: str) -> str | None:
    found = re.search(rf"\s--{name}[= ]['\"]?([^\s'\";]+)", command)
    return found.group(1) if found else None


def _port(command: str, name: str, default: int) -> int:
    given = _option(command, name)
    return int(given) if given and given.isdigit() else default


def given_resources(config: Mapping[str, Any]) -> dict[str, float]:
    """CPUs and GPUs that an on-premise file's worker start command states; empty if none."""
    command = " ".join(map(str, config.get(START[1]) or ()))
    given = {"CPU": _option(command, "num-cpus"), "GPU": _option(command, "num-gpus")}
    return {name: float(n) for name, n in given.items() if n and n.isdigit()}


def ray_binary() -> str:
    """The `ray` command of this Python."""
    return str(Path(sys.executable).parent / "ray")
