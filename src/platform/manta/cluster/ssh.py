"""SSH to the hosts of a launched cluster: one master connection per head, reused by everything.

Unlike Ray's launcher, which accepts any host key each time, a host's key is remembered from the
first connection on.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

from manta.cluster.record import ClusterRecord
from manta.errors import MantaError

CONNECT_TIMEOUT_S = 10
KEEPALIVE_S = 10
"""Between signs of life; three missed ones end the master connection."""


@dataclass(frozen=True, kw_only=True)
class Said:
    """What a remote command said."""

    code: int
    out: str
    err: str


def socket_path(cluster: ClusterRecord) -> Path:
    """The master connection's socket, in a short folder that only its owner can enter."""
    folder = Path(cluster.temp_dir)
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid() or folder.stat().st_mode & 0o077:
        raise MantaError(f"{folder} belongs to somebody else, or is open to others", "remove it")
    return folder / "ssh"


def options(cluster: ClusterRecord) -> list[str]:
    """ssh's options for any host of the cluster."""
    assert cluster.launched
    known_hosts = Path(cluster.launched.config).with_name("known_hosts")
    values = {
        "BatchMode": "yes",
        "ConnectTimeout": CONNECT_TIMEOUT_S,
        "ServerAliveInterval": KEEPALIVE_S,
        "ServerAliveCountMax": 3,
        "StrictHostKeyChecking": "accept-new",
        "UserKnownHostsFile": known_hosts,
        "LogLevel": "ERROR",
    }
    words = [word for name, value in values.items() for word in ("-o", f"{name}={value}")]
    key = cluster.launched.access.key
    return [*words, *(["-i", key, "-o", "IdentitiesOnly=yes"] if key else [])]


def head_words(cluster: ClusterRecord) -> list[str]:
    """The command line up to the head's address."""
    assert cluster.launched
    access = cluster.launched.access
    words = ["ssh", *options(cluster), "-S", str(socket_path(cluster))]
    if access.proxy_command:
        words += ["-o", f"ProxyCommand={access.proxy_command}"]
    return [*words, f"{access.user}@{access.head}" if access.user else access.head]


def on_head(cluster: ClusterRecord, command: str, timeout_s: float = 30) -> Said:
    """Run a shell command on the head's host."""
    return _run([*head_words(cluster), command], timeout_s)


def on_host(cluster: ClusterRecord, address: str, command: str, timeout_s: float = 30) -> Said:
    """Run a shell command on any host: straight from here for the head, else by way of it.

    When the head does not answer, the host is tried straight from here.
    """
    assert cluster.launched
    access = cluster.launched.access
    if address == access.head:
        return on_head(cluster, command, timeout_s)
    target = f"{access.user}@{address}" if access.user else address
    jump = "ProxyCommand=" + shlex.join(_before_host(head_words(cluster), ["-W", "%h:%p"]))
    said = _run(["ssh", *options(cluster), "-o", jump, target, command], timeout_s)
    if said.code == 255:
        said = _run(["ssh", *options(cluster), target, command], timeout_s)
    return said


def in_ray(cluster: ClusterRecord, command: str) -> str:
    """The command as it runs where Ray does: in its container, if it has one."""
    assert cluster.launched
    container = cluster.launched.container
    if not container:
        return command
    return shlex.join(["docker", "exec", container, "bash", "-c", command])


def master_lives(cluster: ClusterRecord) -> bool:
    """Whether the master connection is open, as far as this machine knows."""
    return _run(_before_host(head_words(cluster), ["-O", "check"]), 5).code == 0


def open_master(cluster: ClusterRecord, forwards: dict[int, int]) -> None:
    """Open the master connection with local ports forwarded to loopback ports of the head.

    Raises MantaError with ssh's own words.
    """
    with contextlib.suppress(FileNotFoundError):
        socket_path(cluster).unlink()  # of a master that died
    words = ["-f", "-N", "-M", "-o", "ExitOnForwardFailure=yes"]
    for local, remote in forwards.items():
        words += ["-L", f"127.0.0.1:{local}:127.0.0.1:{remote}"]
    # -f leaves ssh behind in the background with these files open: a pipe would never end.
    log = Path(cluster.temp_dir, "ssh.log")
    with log.open("w") as stream:
        done = subprocess.run(
            _before_host(head_words(cluster), words),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            start_new_session=True,  # the terminal's Ctrl-C is not for the tunnel
        )
    if done.returncode:
        raise MantaError(f"SSH to the head failed: {log.read_text().strip() or 'no reason given'}")


def close_master(cluster: ClusterRecord) -> None:
    """End the master connection and its tunnel; it is no error if there is none."""
    _run(_before_host(head_words(cluster), ["-O", "exit"]), 10)


def _before_host(words: list[str], more: list[str]) -> list[str]:
    return [*words[:-1], *more, words[-1]]


def _run(words: list[str], timeout_s: float) -> Said:
    try:
        done = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired:
        return Said(code=255, out="", err=f"no answer in {timeout_s:g} s")
    except FileNotFoundError:
        raise MantaError("there is no `ssh` command here", "install OpenSSH's client") from None
    return Said(code=done.returncode, out=done.stdout, err=done.stderr.strip())
