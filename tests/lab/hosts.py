"""Real hosts on one machine: each has its own network, processes, mounts, name, home and sshd.

    python tests/lab/hosts.py up [--hosts 4]     start them; prints how to get in
    python tests/lab/hosts.py down               end them, leave nothing

A switch (a bridge in a network namespace of its own, so that the machine's network stays as it
is) joins them; 10.77.0.1 on it is the laptop from which clusters are started. The file system
is shared read-only, so that all run the same Python; /tmp, /dev/shm, /run and home are each
host's own. Needs root, iproute2, util-linux, openssh-server and rsync. No way out to any network.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

SUBNET = "10.77.0"
LAPTOP = f"{SUBNET}.1"
HOME = "/mnt"  # exists everywhere and is empty; hosts mount their own folder over it
TOOLS = ("ip", "unshare", "nsenter", "mount", "sshd", "ssh", "ssh-keygen", "rsync")
NAMESPACES = ("--net", "--pid", "--mount", "--uts", "--ipc")
START_S = 20.0
DEFAULT_FOLDER = Path("/tmp/m-lab")


@dataclass(frozen=True, kw_only=True)
class Host:
    """One host that may be on or off."""

    name: str
    address: str
    folder: Path
    """Seen from outside: its `home`, `tmp` and sshd's `log`."""

    @property
    def pid(self) -> int:
        """Process id, outside, of its first process; 0 when it is off."""
        return _first_process(self.folder)


def why_not() -> str:
    """Why hosts cannot be started here; empty if they can."""
    if os.geteuid() != 0:
        return "the lab's hosts need root (network and process namespaces)"
    missing = [tool for tool in TOOLS if not shutil.which(tool, path=_path())]
    if missing:
        return f"the lab's hosts need {', '.join(missing)} (openssh-server, iproute2, rsync)"
    probe = ["unshare", *NAMESPACES, "--fork", "--mount-proc", "sh", "-c"]
    probe.append("mount -t tmpfs lab /mnt && ip link add name v0 type veth")
    done = subprocess.run(probe, capture_output=True, text=True)
    return f"no namespaces here: {done.stderr.strip()}" if done.returncode else ""


class Lab:
    """A switch, a laptop on it, and hosts `h0`, `h1` …, at 10.77.0.10, .11 …"""

    def __init__(self, folder: Path, num_hosts: int) -> None:
        self.folder = folder
        self.hosts = tuple(
            Host(name=f"h{i}", address=f"{SUBNET}.{10 + i}", folder=folder / f"h{i}")
            for i in range(num_hosts)
        )

    @property
    def key(self) -> Path:
        """The private key that every host's root lets in."""
        return self.folder / "key"

    def up(self) -> None:
        """Start the switch and all hosts; returns when each sshd answers."""
        self.folder.mkdir(mode=0o700)
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "lab", "-f", str(self.key))
        names = [f"{LAPTOP} laptop", *(f"{host.address} {host.name}" for host in self.hosts)]
        (self.folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *names, ""]))
        (self.folder / "resolv.conf").write_text("")
        self._start_switch()
        for host in self.hosts:
            self._spawn(host)
        for host in self.hosts:
            self._wait_for_sshd(host)

    def down(self) -> None:
        """End every process of every host, and remove the folder. Idempotent."""
        for host in self.hosts:
            self.power_off(host)
        _kill(_first_process(self.folder))
        shutil.rmtree(self.folder, ignore_errors=True)

    def power_on(self, host: Host) -> None:
        """Start a host that is off, with the disk that it had; returns when its sshd answers."""
        self._spawn(host)
        self._wait_for_sshd(host)

    def power_off(self, host: Host) -> None:
        """End a host as a power cut does: every process at once, nothing said to anybody."""
        _kill(host.pid)
        _run(*self._on_switch("ip", "link", "del", host.name), check=False)

    def unplug(self, host: Host) -> None:
        """Take the host's cable out of the switch."""
        _run(*self._on_switch("ip", "link", "set", host.name, "down"))

    def plug(self, host: Host) -> None:
        """Put the cable back."""
        _run(*self._on_switch("ip", "link", "set", host.name, "up"))

    def laptop(self, *words: str) -> list[str]:
        """The command line that runs `words` on the laptop."""
        return self._on_switch(*words)

    def inside(self, host: Host, *words: str) -> list[str]:
        """The command line that runs `words` on a host as its console would, without SSH."""
        return ["nsenter", "-t", str(host.pid), "-n", "-p", "-m", "-u", "-i", *words]

    def _on_switch(self, *words: str) -> list[str]:
        return ["nsenter", "-t", str(_first_process(self.folder)), "-n", "-m", *words]

    def _start_switch(self) -> None:
        script = f"""
            ip link set lo up
            ip link add name switch type bridge && ip addr add {LAPTOP}/24 dev switch
            ip link set switch up && ip route add default dev switch
            mount --make-rprivate /
            mount --bind {self.folder}/hosts /etc/hosts
            mount --bind {self.folder}/resolv.conf /etc/resolv.conf
        """
        self._start(self.folder, ["--net", "--mount"], script, "exec sleep infinity")

    def _spawn(self, host: Host) -> None:
        for name in ("home/.ssh", "tmp"):
            (host.folder / name).mkdir(parents=True, exist_ok=True)
        (host.folder / "tmp").chmod(0o1777)
        (host.folder / "home/.ssh").chmod(0o700)
        shutil.copy(f"{self.key}.pub", host.folder / "home/.ssh/authorized_keys")
        self._write_account(host)
        if not (host.folder / "host_key").exists():
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", f"{host.folder}/host_key")
        self._start(
            host.folder,
            [*NAMESPACES, "--fork", "--mount-proc", "--kill-child"],
            self._mounts(host),
            f"exec {shlex.quote(sys.executable)} {Path(__file__).resolve()} init {host.folder}",
        )
        pid = str(host.pid)
        # The host's end of the cable is put into its namespace from outside.
        cable = f"""
            ip link add name {host.name} type veth peer name eth0 netns {pid}
            ip link set {host.name} master switch up
        """
        _run(*self._on_switch("sh", "-ec", cable))
        inside = f"""
            ip link set lo up
            ip addr add {host.address}/24 dev eth0
            ip link set eth0 up && ip route add default via {LAPTOP}
        """
        _run("nsenter", "-t", pid, "-n", "sh", "-ec", inside)

    def _write_account(self, host: Host) -> None:
        """Root, with a home of this host's own, and a login shell that finds Python and Ray."""
        others = [
            line for line in Path("/etc/passwd").read_text().splitlines() if line[:5] != "root:"
        ]
        account = f"root:x:0:0:root:{HOME}:/bin/bash"
        (host.folder / "passwd").write_text("\n".join([account, *others, ""]))
        profile = f"export PATH={Path(sys.executable).parent}:$PATH\n"
        for name in (".bash_profile", ".bashrc"):
            (host.folder / "home" / name).write_text(profile)

    def _mounts(self, host: Host) -> str:
        """Everything read-only but this host's own folders, which cover the machine's."""
        kept = [Path(sys.prefix), Path(sys.base_prefix), Path(__file__).resolve().parents[2]]
        own = {"home": HOME, "tmp": "/tmp"}  # in this order: the second hides the first
        lines = [f"hostname {host.name}", "mount --make-rprivate /"]
        for name, target in own.items():
            # What is shared may itself lie below a folder that is covered, e.g. a clone in /tmp.
            for path in (path for path in kept if path.is_relative_to(target)):
                inner = host.folder / name / path.relative_to(target)
                lines += [f"mkdir -p {inner}", f"mount --bind {path} {inner}"]
        lines += [f"mount -o bind,ro {path} {path}" for path in kept if not _is_below(path, own)]
        lines += [f"mount --bind {host.folder}/passwd /etc/passwd"]
        lines += [f"mount --bind {self.folder}/{n} /etc/{n}" for n in ("hosts", "resolv.conf")]
        lines += ["mount -t tmpfs -o size=2g,mode=1777 shm /dev/shm"]
        lines += ["mount -t tmpfs run /run && mkdir -m 755 /run/sshd"]
        # Last: they hide the machine's /tmp, where these folders are; 9 keeps a way to them.
        lines += [f"exec 9<{host.folder}"]
        lines += [f"mount --rbind {host.folder}/{name} {target}" for name, target in own.items()]
        lines += ["mount -o remount,bind,ro /"]
        return "\n".join(lines)

    def _start(self, folder: Path, unshare: list[str], prepare: str, then: str) -> None:
        """Start a process in new namespaces; returns when `prepare` is done in them."""
        folder.mkdir(parents=True, exist_ok=True)
        ready, is_ready = os.pipe()
        script = f"set -e\n{prepare}\necho ready >&{is_ready}; exec {is_ready}>&-\n{then}"
        with (folder / "log").open("ab") as log:
            process = subprocess.Popen(
                ["unshare", *unshare, "bash", "-c", script],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[is_ready],
                start_new_session=True,
                env=_clean_environment(),
            )
        (folder / "pid").write_text(
            str(process.pid)
        )  # first, so that `down` ends it whatever follows
        os.close(is_ready)
        with os.fdopen(ready) as stream:
            said = stream.readline()  # not to the end: unshare itself keeps the pipe open
        assert said.strip() == "ready", (folder / "log").read_text()[-2000:]

    def _wait_for_sshd(self, host: Host) -> None:
        deadline = time.monotonic() + START_S
        probe = f"exec 3<>/dev/tcp/{host.address}/22"
        while subprocess.run(self.laptop("bash", "-c", probe), capture_output=True).returncode:
            assert time.monotonic() < deadline, (host.folder / "log").read_text()[-2000:]
            time.sleep(0.05)


def init() -> None:
    """The first process of a host: starts sshd and collects every process that ends."""
    folder = "/proc/self/fd/9"  # the host's folder; its path is covered by the host's own /tmp
    config = {
        "HostKey": "/run/host_key",
        "PidFile": "none",
        "AuthorizedKeysFile": ".ssh/authorized_keys",
        "PermitRootLogin": "prohibit-password",
        "PasswordAuthentication": "no",
        "UseDNS": "no",
        "UsePAM": "no",
        "StrictModes": "no",
        "MaxStartups": "100",
    }
    shutil.copy(f"{folder}/host_key", "/run/host_key")
    Path("/run/host_key").chmod(0o600)
    os.close(9)
    options = [word for item in config.items() for word in ("-o", "=".join(item))]
    sshd = shutil.which("sshd", path=_path())
    assert sshd
    subprocess.Popen([sshd, "-D", "-e", "-f", "/dev/null", *options])
    while True:
        with contextlib.suppress(ChildProcessError):
            os.wait()


@contextlib.contextmanager
def lab(num_hosts: int) -> Iterator[Lab]:
    """A lab in a folder of its own, which is gone after the block."""
    folder = Path(tempfile.mkdtemp(prefix="m-lab-", dir="/tmp"))
    folder.rmdir()
    started = Lab(folder, num_hosts)
    try:
        started.up()
        yield started
    finally:
        started.down()


def _first_process(folder: Path) -> int:
    """Of the namespaces made by `unshare`, whose process id lies in the folder."""
    try:
        pid = int((folder / "pid").read_text())
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (OSError, ValueError):
        return 0
    if (folder / "tmp").exists():  # a host: unshare has forked
        return int(children[0]) if children else 0
    return pid


def _kill(pid: int) -> None:
    if not pid:
        return
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    while Path(f"/proc/{pid}").exists() and " Z " not in _stat(pid):
        time.sleep(0.02)


def _stat(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return " Z "


def _is_below(path: Path, covered: Mapping[str, str]) -> bool:
    return any(path.is_relative_to(target) for target in covered.values())


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def _clean_environment() -> dict[str, str]:
    """What sshd starts with: nothing of the shell that started the lab."""
    return {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "LANG": "C.UTF-8",
    }


def _run(*words: str, check: bool = True) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    assert not check or done.returncode == 0, f"{shlex.join(words)}: {done.stderr}"


def main() -> None:
    """Start or end a lab from a shell."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("action", choices=["up", "down", "init"])
    parser.add_argument("folder", nargs="?", type=Path, default=DEFAULT_FOLDER)
    parser.add_argument("--hosts", type=int, default=4)
    arguments = parser.parse_args()
    if arguments.action == "init":
        init()
    reason = why_not()
    if reason:
        sys.exit(reason)
    num_hosts = len(list(arguments.folder.glob("h*/pid"))) or arguments.hosts
    found = Lab(arguments.folder, num_hosts)
    if arguments.action == "down":
        found.down()
        return
    found.up()
    print(json.dumps({host.name: host.address for host in found.hosts}))
    print(f"on the laptop: {shlex.join(found.laptop('bash'))}")
    print(f"on a host: ssh -i {found.key} root@{found.hosts[0].address}, from the laptop")


if __name__ == "__main__":
    main()
