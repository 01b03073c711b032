"""The ports of a cluster on this machine: which it takes, which are free, who holds the others."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterable
from dataclasses import dataclass, fields

from manta.errors import InputError, MantaError

LOOPBACK = "127.0.0.1"
# Below the range from which Linux gives ports to outgoing connections (32768 on), so that a port
# found free stays free until Ray binds it a few seconds later.
CANDIDATES = range(20000, 32768)


@dataclass(frozen=True, kw_only=True)
class Ports:
    """Every port that has to be known before the cluster starts; it picks the others itself."""

    gcs: int
    dashboard: int
    serve: int
    agent: int
    """HTTP port of the job and metrics agent."""
    ray_client: int
    autoscaler_metrics: int
    dashboard_metrics: int
    serve_grpc: int
    serve_fallback: int
    """HTTP port of the Python proxy behind HAProxy."""
    haproxy_metrics: int
    haproxy_stats: int


WELL_KNOWN = {"gcs": 6379, "dashboard": 8265, "serve": 8000}
"""Ports that people know by heart, each with an option `--NAME-port`."""


def choose(asked: dict[str, int | None], *, automatic: bool) -> Ports:
    """Ports as asked for; the rest well known, or free ones when `automatic` or internal.

    Raises InputError if two of them are the same.
    """
    fixed = {name: port for name, port in asked.items() if port is not None}
    if not automatic:
        fixed = WELL_KNOWN | fixed
    twice = [name for name, port in fixed.items() if list(fixed.values()).count(port) > 1]
    if twice:
        options = " and ".join(f"--{name}-port" for name in sorted(twice))
        raise InputError(f"port {fixed[twice[0]]} is wanted twice", f"give {options} ports apart")
    names = [field.name for field in fields(Ports) if field.name not in fixed]
    return Ports(**fixed, **dict(zip(names, free(len(names), fixed.values()), strict=True)))


def is_free(port: int) -> bool:
    """Whether a server could listen on this port now, on loopback and on every interface."""
    return all(_can_bind(host, port) for host in (LOOPBACK, "0.0.0.0"))


def holder(port: int) -> str:
    """Who listens on a port, for people: command and process id, as far as this user may see."""
    import psutil

    for connection in psutil.net_connections("inet"):
        listens = connection.status == psutil.CONN_LISTEN
        if not listens or getattr(connection.laddr, "port", None) != port:
            continue
        if connection.pid is None:
            return "a process of another user"
        try:
            command = " ".join(psutil.Process(connection.pid).cmdline())
        except psutil.Error:
            command = "a process that just ended"
        return f"process {connection.pid} ({command[:80].strip()})"
    return "a process that is not visible from here"


def require_free(ports: Ports) -> None:
    """Raise InputError for the first of the well-known ports that is taken."""
    for name in WELL_KNOWN:
        port = getattr(ports, name)
        if not is_free(port):
            raise InputError(
                f"port {port} ({name}) is held by {holder(port)}",
                f"choose another with --{name}-port, or let `--ports auto` pick free ones",
            )


def free(count: int, avoid: Iterable[int] = ()) -> list[int]:
    """Ports that nobody listens on now. Raises MantaError if there are too few."""
    found: list[int] = []
    for port in random.sample(CANDIDATES, len(CANDIDATES)):
        if len(found) == count:
            return found
        if port not in avoid and is_free(port):
            found.append(port)
    raise MantaError(f"no {count} free ports between {CANDIDATES[0]} and {CANDIDATES[-1]}")


def _can_bind(host: str, port: int) -> bool:
    with socket.socket() as probe:
        # As servers do: connections that linger after their server ended do not hold the port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True
