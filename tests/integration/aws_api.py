"""AWS's API on this machine: moto behind a proxy that writes down calls and can refuse them.

moto keeps the state of EC2, IAM and SSM. What it does not model (capacity, quotas) the proxy
answers in its place, with the error document that AWS sends.
"""

from __future__ import annotations

import http.client
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType
from urllib.parse import parse_qsl

_MOTO = """
import logging, sys
from moto.server import ThreadedMotoServer
logging.getLogger("werkzeug").setLevel(logging.ERROR)
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()  # ends with the process that started this one
"""
_ERROR = """<?xml version="1.0" encoding="UTF-8"?>
<Response><Errors><Error><Code>{code}</Code><Message>{message}</Message></Error></Errors>\
<RequestID>5f3cf3a5-8a5e-4c1c-9d5c-000000000000</RequestID></Response>"""


@dataclass(frozen=True, kw_only=True)
class Call:
    """One request of the query protocol (EC2, IAM): its action and flat parameters."""

    action: str
    parameters: Mapping[str, str]

    def values(self, prefix: str) -> tuple[str, ...]:
        """The values of parameters whose names start with `prefix`, in the order sent."""
        return tuple(v for k, v in self.parameters.items() if k.startswith(prefix))


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Answer calls of `action` that have all of `where` with this error instead."""

    action: str
    code: str
    message: str
    status: int = 400
    where: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    def applies_to(self, call: Call) -> bool:
        return call.action == self.action and self.where.items() <= call.parameters.items()


class AwsApi:
    """The proxy: `url` is AWS's endpoint for every service."""

    def __init__(self, moto_port: int) -> None:
        self.calls: list[Call] = []
        self._refusals: list[Refusal] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self, moto_port))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    @contextmanager
    def refusing(self, *refusals: Refusal) -> Iterator[None]:
        self._refusals.extend(refusals)
        yield
        self._refusals = [r for r in self._refusals if r not in refusals]

    def named(self, action: str) -> list[Call]:
        return [call for call in self.calls if call.action == action]

    def refusal_of(self, call: Call) -> Refusal | None:
        return next((r for r in self._refusals if r.applies_to(call)), None)


@contextmanager
def aws_api() -> Iterator[AwsApi]:
    """A fresh account, in a process of its own: other tests' buckets live in this one's moto."""
    with subprocess.Popen(
        [sys.executable, "-c", _MOTO], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as moto:
        assert moto.stdin is not None
        assert moto.stdout is not None
        api = AwsApi(int(moto.stdout.readline()))
        try:
            yield api
        finally:
            api.close()
            moto.stdin.close()
            moto.wait(timeout=10)


def _handler(api: AwsApi, moto_port: int) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            call = _call(self.headers.get("X-Amz-Target", ""), body)
            api.calls.append(call)
            if refusal := api.refusal_of(call):
                text = _ERROR.format(code=refusal.code, message=refusal.message)
                self._answer(refusal.status, "text/xml;charset=UTF-8", text.encode())
                return
            upstream = http.client.HTTPConnection("127.0.0.1", moto_port, timeout=30)
            upstream.request("POST", self.path, body, dict(self.headers))
            reply = upstream.getresponse()
            self._answer(reply.status, reply.headers["Content-Type"], reply.read())
            upstream.close()

        def _answer(self, status: int, content_type: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Quiet: `calls` is the log."""

    return Handler


def _call(target: str, body: bytes) -> Call:
    parameters = {} if target else dict(parse_qsl(body.decode(), keep_blank_values=True))
    action = target.rpartition(".")[2] or parameters.pop("Action", "")
    return Call(action=action, parameters=MappingProxyType(parameters))
