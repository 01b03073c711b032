"""Rules over cluster YAMLs: who may reach the cluster, and with which key."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from manta.check.cluster_shape import spec
from manta.check.rules import Fault, File, Project, rule, texts
from manta.spec.cluster import ClusterSpec
from manta.spec.loading import Path_

_MODE = re.compile(r"\bRAY_AUTH_MODE=['\"]?(\w+)")
_ANYWHERE = ("0.0.0.0/0", "::/0")
_HEAD = ("head_start_ray_commands", "head_setup_commands", "setup_commands")
_WORKERS = ("worker_start_ray_commands", "worker_setup_commands", "setup_commands")


def auth_mode(cluster: ClusterSpec, keys: tuple[str, ...]) -> str | None:
    """RAY_AUTH_MODE that commands or container options set; None if nothing does."""
    options = cluster.docker.run_options
    options += cluster.docker.head_run_options if keys is _HEAD else ()
    options += cluster.docker.worker_run_options if keys is _WORKERS else ()
    commands = [command for key in keys for command in getattr(cluster, key) or ()]
    for text in (*commands, *map(str, options)):
        if match := _MODE.search(text):
            return match[1].lower()
    return None


@rule("cluster-auth-off", "warning", "cluster")
def auth_off(file: File, project: Project) -> Iterator[Fault]:
    """Without RAY_AUTH_MODE=token whoever reaches a port runs code (CVE-2023-48022)."""
    cluster = spec(file)
    if auth_mode(cluster, _HEAD) is None and auth_mode(cluster, _WORKERS) is None:
        fix = "write `export RAY_AUTH_MODE=token; ray start …` in both, and ship ~/.ray/auth_token"
        path: Path_ = ("head_start_ray_commands",)
        yield Fault(path, "no node sets RAY_AUTH_MODE=token", fix)


@rule("cluster-auth-disabled", "error", "cluster")
def auth_disabled(file: File, project: Project) -> Iterator[Fault]:
    """Authentication is turned off on purpose: whoever reaches a port runs code."""
    for path, text in texts(file.value):
        match = _MODE.search(text)
        if match and match[1].lower() != "token":
            yield Fault(path, f"RAY_AUTH_MODE={match[1]}", "write RAY_AUTH_MODE=token")


@rule("cluster-auth-partial", "error", "cluster")
def auth_partial(file: File, project: Project) -> Iterator[Fault]:
    """If only some nodes authenticate, workers never join and nothing says why."""
    cluster = spec(file)
    modes = {"head": auth_mode(cluster, _HEAD), "worker": auth_mode(cluster, _WORKERS)}
    for side, other in (("head", "worker"), ("worker", "head")):
        key = f"{side}_start_ray_commands"
        if modes[side] is None and modes[other] == "token" and file.value.get(key):
            what = f"RAY_AUTH_MODE=token is set on the {other}, not on the {side}"
            yield Fault((key,), what, "set it in both")


@rule("cluster-token-not-shipped", "error", "cluster")
def token_not_shipped(file: File, project: Project) -> Iterator[Fault]:
    """A node in token mode without a token cannot start; workers never join."""
    cluster = spec(file)
    if "token" not in (auth_mode(cluster, _HEAD), auth_mode(cluster, _WORKERS)):
        return
    shipped = any("auth_token" in str(remote) for remote in cluster.file_mounts)
    named = any("RAY_AUTH_TOKEN" in text for _, text in texts(file.value))
    if not shipped and not named:
        path = ("file_mounts",) if "file_mounts" in file.value else ("head_start_ray_commands",)
        fix = 'add file_mounts: {"~/.ray/auth_token": "~/.ray/auth_token"}'
        yield Fault(path, "RAY_AUTH_MODE=token, but no node gets the token", fix)


@rule("cluster-dashboard-open", "warning", "cluster")
def dashboard_open(file: File, project: Project) -> Iterator[Fault]:
    """The dashboard's job API runs commands; on loopback only SSH reaches it."""
    for i, command in enumerate(spec(file).head_start_ray_commands or ()):
        match = re.search(r"--dashboard-host[= ]['\"]?([^\s'\";]+)", command)
        if match and not match[1].startswith(("127.", "localhost", "::1")):
            what = f"the dashboard listens on {match[1]}"
            fix = "write --dashboard-host=127.0.0.1; `ray dashboard` tunnels to it"
            yield Fault(("head_start_ray_commands", i), what, fix)


@rule("cluster-ports-open", "warning", "cluster")
def ports_open(file: File, project: Project) -> Iterator[Fault]:
    """A rule that admits the whole internet."""
    group = spec(file).provider.security_group
    for i, permission in enumerate(group.IpPermissions if group else ()):
        if isinstance(permission, dict) and (source := _open_source(permission)):
            ports = {str(permission.get(key, "all")) for key in ("FromPort", "ToPort")}
            path = ("provider", "security_group", "IpPermissions", i)
            what = f"port {'-'.join(sorted(ports))} is open to {source}"
            yield Fault(path, what, "name your own network, e.g. 203.0.113.0/24")


def _open_source(permission: dict[str, Any]) -> str | None:
    ranges = [*(permission.get("IpRanges") or ()), *(permission.get("Ipv6Ranges") or ())]
    for each in ranges:
        source = (each.get("CidrIp") or each.get("CidrIpv6")) if isinstance(each, dict) else None
        if source in _ANYWHERE:
            return str(source)
    return None


@rule("cluster-public-addresses", "warning", "cluster")
def public_addresses(file: File, project: Project) -> Iterator[Fault]:
    """Nodes get public addresses, and Ray's own network rules admit SSH from anywhere."""
    cluster = spec(file)
    if cluster.provider.type not in ("aws", "gcp", "azure") or cluster.provider.use_internal_ips:
        return
    fix = "write `use_internal_ips: true` and come in by VPN, peering or a tunnel"
    yield Fault(("provider",), "nodes are reachable from the internet", fix)


@rule("cluster-ssh-user", "error", "cluster")
def ssh_user(file: File, project: Project) -> Iterator[Fault]:
    """Ray logs in as auth.ssh_user; an `auth` without it replaces the default that has it."""
    cluster = spec(file)
    given = "auth" in file.value or cluster.provider.type == "local"
    clouds = ("aws", "gcp", "azure", "local")
    if given and cluster.provider.type in clouds and not cluster.auth.ssh_user:
        yield Fault(("auth",), "`auth.ssh_user` is missing", "add `ssh_user: ubuntu`")


@rule("cluster-ssh-key", "error", "cluster")
def ssh_key(file: File, project: Project) -> Iterator[Fault]:
    """Ray cannot log in: the key that it will use is not the key that the machines accept."""
    cluster = spec(file)
    auth = cluster.auth
    if auth.ssh_proxy_use_node_id and not auth.ssh_proxy_command:
        path = ("auth", "ssh_proxy_use_node_id")
        yield Fault(path, "ssh_proxy_use_node_id without ssh_proxy_command", "add the command")
    if cluster.provider.type == "azure" and bool(auth.ssh_private_key) != bool(
        auth.ssh_public_key
    ):
        yield Fault(("auth",), "one half of the SSH key is missing", "give both, or neither")
    if cluster.provider.type == "aws" and auth.ssh_private_key:
        yield from _without_key_name(cluster)


def _without_key_name(cluster: ClusterSpec) -> Iterator[Fault]:
    for name, node_type in cluster.node_types.items():
        config = node_type.node_config_passthrough
        if not config.keys() & {"KeyName", "UserData", "LaunchTemplate"}:
            path = ("available_node_types", name, "node_config")
            fix = "add `KeyName: …`, or drop auth.ssh_private_key and let Ray make a key"
            yield Fault(path, f"`{name}` has no KeyName for auth.ssh_private_key", fix)


@rule("cluster-ssh-key-file", "warning", "cluster")
def ssh_key_file(file: File, project: Project) -> Iterator[Fault]:
    """The SSH key that Ray would log in with is not on this machine."""
    cluster = spec(file)
    for key in ("ssh_private_key", "ssh_public_key"):
        name = getattr(cluster.auth, key)
        if name and not _is_file(name):
            fix = "make it with ssh-keygen, or name the one that you have"
            yield Fault(("auth", key), f"there is no file {name} here", fix)
    if cluster.provider.type == "local" and not cluster.auth.ssh_private_key:
        fix = "add `ssh_private_key: ~/.ssh/…`; the head needs it to reach the workers"
        yield Fault(("auth",), "auth.ssh_private_key is missing", fix)


def _is_file(name: str) -> bool:
    try:
        return Path(name).expanduser().is_file()
    except (OSError, RuntimeError, ValueError):
        return False
