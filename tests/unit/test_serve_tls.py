"""TLS at the endpoint: the real HAProxy with Ray's own configuration, changed by the script."""

from __future__ import annotations

import re
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import httpx
import psutil
import pytest
from click.testing import CliRunner
from proxies import end_all, listening
from ray.serve._private import haproxy_templates

from manta.cli.main import cli
from manta.cluster import haproxy, tls
from manta.cluster.ports import free
from manta.errors import InputError


@dataclass
class Place:
    """A certificate, and where HAProxy listens."""

    folder: Path
    plain: int
    secure: int

    @property
    def certificate(self) -> Path:
        return self.folder / "tls-here" / "node.crt"

    @property
    def key(self) -> Path:
        return self.folder / "tls-here" / "node.key"

    @property
    def https(self) -> haproxy.Https:
        return haproxy.https(f"127.0.0.1:{self.secure}", self.certificate, self.key)

    def client(self, *, max_version: ssl.TLSVersion | None = None) -> httpx.Client:
        context = ssl.create_default_context(cafile=str(self.folder / "tls-here" / "ca.crt"))
        if max_version:
            context.maximum_version = max_version
        return httpx.Client(verify=context, trust_env=False)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    if haproxy.binary() is None:
        pytest.skip("no HAProxy on this platform")
    tls.new_keys(tmp_path)
    return Place(tmp_path, *free(2, ()))


class Model(BaseHTTPRequestHandler):
    """What lies behind."""

    heard: ClassVar[list[dict[str, str]]] = []
    """The headers of each request, names in lower case."""

    def do_GET(self) -> None:
        self.heard.append({name.lower(): value for name, value in self.headers.items()})
        body = b"a model"
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words: object) -> None:
        pass


@contextmanager
def running(place: Place) -> Iterator[None]:
    """HAProxy as Ray starts it, with the beginning of Ray's own frontend."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Model)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    template = haproxy_templates.HAPROXY_CONFIG_TEMPLATE
    front = re.search(r"^frontend http_frontend\n *bind .*\n", template, re.MULTILINE)
    assert front
    bind = re.sub(r"{{ config.frontend_host }}:{{ .*? }}", f"127.0.0.1:{place.plain}", front[0])
    config = place.folder / "haproxy.cfg"
    config.write_text(
        "global\n    nbthread 1\ndefaults\n    mode http\n    timeout client 5s\n"
        f"    timeout server 5s\n    timeout connect 5s\n{bind}    use_backend model if TRUE\n"
        f"backend model\n    server one 127.0.0.1:{server.server_port}\n"
    )
    program = haproxy.binary()
    assert program
    script = place.folder / "h" / haproxy.SCRIPT
    if not script.exists():
        haproxy.write_script(script.parent, program, place.https)
    for _ in range(2):  # as when it is started anew with the same file
        subprocess.run([script, "-c", "-f", config], check=True, capture_output=True)
    process = subprocess.Popen([script, "-db", "-f", config])
    try:
        yield
    finally:
        end_all(config)
        process.wait(10)
        server.shutdown()


def fetch(client: httpx.Client, url: str) -> httpx.Response:
    deadline = time.monotonic() + 10
    while True:
        try:
            return client.get(url)
        except (httpx.ConnectError, httpx.ReadError) as error:
            now_down = re.search("refused|reset", str(error))
            if not now_down or time.monotonic() > deadline:
                raise
        time.sleep(0.05)


def test_it_is_served_with_tls_beside_the_plain_port_on_loopback(place: Place) -> None:
    with running(place):
        answer = fetch(place.client(), f"https://127.0.0.1:{place.secure}/v1/models")
        assert (answer.status_code, answer.text) == (200, "a model")
        assert fetch(place.client(), f"http://127.0.0.1:{place.plain}/").text == "a model"
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            fetch(httpx.Client(trust_env=False), f"https://127.0.0.1:{place.secure}/")
        old = place.client(max_version=ssl.TLSVersion.TLSv1_1)
        with pytest.raises(httpx.ConnectError):
            fetch(old, f"https://127.0.0.1:{place.secure}/")
    pem = place.folder / "h" / "tls.pem"
    assert pem.stat().st_mode & 0o777 == 0o600


def test_a_renewed_certificate_serves_when_haproxy_starts_anew_and_a_lost_one_goes_on(
    place: Place,
) -> None:
    with running(place):
        fetch(place.client(), f"https://127.0.0.1:{place.secure}/")
    before = (place.folder / "h" / "tls.pem").read_bytes()
    tls.new_keys(place.folder)
    with running(place):
        fetch(place.client(), f"https://127.0.0.1:{place.secure}/")
    assert (place.folder / "h" / "tls.pem").read_bytes() != before
    place.key.unlink()
    with running(place):
        fetch(place.client(), f"https://127.0.0.1:{place.secure}/")


def test_one_that_is_killed_is_replaced_within_a_moment_each_time(place: Place) -> None:
    config = place.folder / "haproxy.cfg"
    with running(place):
        for _ in range(3):
            fetch(place.client(), f"http://127.0.0.1:{place.plain}/")
            (killed,) = listening(config)
            killed.kill()
            assert fetch(place.client(), f"https://127.0.0.1:{place.secure}/").text == "a model"


def test_one_that_ray_starts_takes_over_from_the_stand_in_once_it_knows_of_applications(
    place: Place,
) -> None:
    config, script = place.folder / "haproxy.cfg", place.folder / "h" / haproxy.SCRIPT
    plain = f"http://127.0.0.1:{place.plain}/"
    with running(place):
        fetch(place.client(), plain)
        (killed,) = listening(config)
        killed.kill()
        fetch(place.client(), plain)
        (stand_in,) = [process.pid for process in listening(config)]
        known = config.read_text()
        config.write_text(re.sub("use_backend .*", "http-request return status 404", known))
        empty = subprocess.Popen([script, "-db", "-f", config])
        until(lambda: len(listening(config)) == 2)
        assert fetch(place.client(), plain).text == "a model"
        psutil.Process(stand_in).kill()  # the empty one is no help: there has to be another
        assert fetch(place.client(), plain).text == "a model"
        config.write_text(known)
        full = subprocess.Popen([script, "-db", "-f", config, "-sf", str(empty.pid)])
        until(lambda: [process.pid for process in listening(config)] == [full.pid])
        assert fetch(place.client(), plain).text == "a model"
        end_all(config)
        for process in (empty, full):
            process.wait(10)


def until(check: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_headers_on_which_ray_fails_or_that_hide_who_has_gone_do_not_get_through(
    place: Place,
) -> None:
    url = f"http://127.0.0.1:{place.plain}/v1/models"
    names = ("x-request-id", "x-session-id", "x-request-timeout-seconds")
    with running(place):
        fetch(place.client(), url)
        for value in (b"\xe4", b"a-good-1"):
            headers = [(name.encode(), value) for name in names]
            headers += [(b"x-request-disconnect-disabled", b"?1"), (b"x-other", value)]
            assert place.client().get(url, headers=headers).text == "a model"
    odd, good = Model.heard[-2:]
    assert not {*names, "x-request-disconnect-disabled"} & odd.keys()
    assert "x-other" in odd
    assert [good[name] for name in names] == ["a-good-1"] * 3
    assert "x-request-disconnect-disabled" not in good


def test_without_it_nothing_speaks_tls(place: Place) -> None:
    haproxy.write_script(place.folder / "h", "/bin/true")
    config = place.folder / "haproxy.cfg"
    config.write_text("frontend http_frontend\n    bind 127.0.0.1:1\n")
    subprocess.run([place.folder / "h" / haproxy.SCRIPT, "-f", config], check=True)
    assert " ssl " not in config.read_text()


@pytest.mark.parametrize(
    "address", ["8443", ":8443", "0.0.0.0:", "0.0.0.0:99999", "a b:1", "a|b:1"]
)
def test_an_address_that_is_none_is_refused(place: Place, address: str) -> None:
    with pytest.raises(InputError, match="no address"):
        haproxy.https(address, place.certificate, place.key)


def test_files_that_do_not_fit_are_refused_before_anything_starts(place: Place) -> None:
    other = place.folder / "tls" / "ca.key"
    for certificate, key in (
        (place.certificate, other),
        (place.key, place.certificate),
        (place.certificate, place.folder / "missing"),
        (place.certificate, place.folder),
    ):
        with pytest.raises(InputError):
            haproxy.https("0.0.0.0:8443", certificate, key)
    words = ["up", "--dry-run", "--serve-tls", str(place.certificate)]
    good = CliRunner().invoke(cli, [*words, str(place.key)])
    assert good.exit_code == 0, good.output
    without = {"RAY_SERVE_ENABLE_HA_PROXY": "0"}
    refused = CliRunner().invoke(cli, [*words, str(place.key)], env=without)
    assert refused.exit_code != 0
