"""An S3 server that fails a share of the writes, as a real one does on a bad day: HTTP 500."""

from __future__ import annotations

import http.client
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from moto.server import ThreadedMotoServer

ERROR = (
    b'<?xml version="1.0" encoding="UTF-8"?>\n'
    b"<Error><Code>InternalError</Code><Message>We encountered an error.</Message></Error>"
)
OF_THIS_HOP = {"connection", "transfer-encoding", "date", "server", "content-length"}


class FlakyStorage:
    """A proxy in front of a server at `behind`; counts writes, and fails `share` of them."""

    def __init__(self, behind: str, share: float, seed: int) -> None:
        self.share, self.num_writes, self.num_failed = share, 0, 0
        self._behind, self._chance, self._lock = behind, random.Random(seed), threading.Lock()
        flaky = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                flaky.answer(self)

            do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

            def log_message(self, *arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        """Pass a request on, or fail it."""
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        if request.command in ("PUT", "POST") and self._fails():
            return _send(request, 500, [("Content-Type", "application/xml")], ERROR)
        connection = http.client.HTTPConnection(self._behind, timeout=30)
        connection.request(request.command, request.path, body, dict(request.headers))
        answer = connection.getresponse()
        data, headers = answer.read(), answer.getheaders()
        connection.close()
        return _send(request, answer.status, headers, data)

    def _fails(self) -> bool:
        with self._lock:
            self.num_writes += 1
            failed = self._chance.random() < self.share
            self.num_failed += failed
            return failed


def _send(
    request: BaseHTTPRequestHandler, status: int, headers: list[tuple[str, str]], data: bytes
) -> None:
    request.send_response(status)
    length = str(len(data))
    for name, value in headers:
        if name.lower() == "content-length" and request.command == "HEAD":
            length = value  # of what a GET would give
        elif name.lower() not in OF_THIS_HOP:
            request.send_header(name, value)
    request.send_header("Content-Length", length)
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(data)


@contextmanager
def flaky_storage(share: float, seed: int) -> Iterator[tuple[FlakyStorage, dict[str, str]]]:
    """A flaky server with bucket `manta`, and the environment that a client of it needs."""
    import boto3

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    access = {"aws_access_key_id": "test", "aws_secret_access_key": "test"}
    client = boto3.client(
        "s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1", **access
    )
    client.create_bucket(Bucket="manta")
    flaky = FlakyStorage(f"{host}:{port}", share, seed)
    environment = {
        "AWS_ENDPOINT_URL": flaky.url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",  # each failure reaches Manta, not the client's own retries
        "no_proxy": "*",
    }
    try:
        yield flaky, environment
    finally:
        flaky.close()
        server.stop()
