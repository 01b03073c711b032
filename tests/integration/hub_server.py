"""A Hugging Face Hub with the models that it is given: what its own client asks for, no more."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Files = dict[str, bytes]


class Hub:
    """Models by name; of each all commits, and which one a branch means."""

    def __init__(self) -> None:
        self.url = ""
        self.commits: dict[tuple[str, str], Files] = {}
        self.branches: dict[tuple[str, str], str] = {}
        self.private: dict[str, str] = {}
        """Model → the token that opens it."""
        self.pages: dict[str, tuple[int, bytes, dict[str, str]]] = {}
        """Other things that it answers: path → status, body, headers."""
        self.asked: list[str] = []

    def push(self, model: str, files: Files, branch: str = "main") -> str:
        """Returns the commit."""
        digest = hashlib.sha1(repr(sorted(files.items())).encode(), usedforsecurity=False)
        commit = digest.hexdigest()
        self.commits[model, commit] = files
        self.branches[model, branch] = commit
        return commit

    def find(self, model: str, revision: str) -> tuple[str, Files] | None:
        """The commit that a revision means, and its files."""
        commit = self.branches.get((model, revision), revision)
        files = self.commits.get((model, commit))
        return (commit, files) if files is not None else None

    def has(self, model: str, token: str | None) -> bool:
        """Whether the model is there for who has this token."""
        is_open = self.private.get(model, token) == token
        return is_open and any(name == model for name, _ in self.commits)


@contextmanager
def running() -> Iterator[Hub]:
    """A Hub on a free port of loopback."""
    hub = Hub()

    class Handler(_Handler):
        models = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


_NAME = r"(?P<model>[^/]+/[^/]+)"
_INFO = re.compile(rf"/api/models/{_NAME}(/revision/(?P<revision>[^/?]+))?(\?.*)?")
_TREE = re.compile(rf"/api/models/{_NAME}/tree/(?P<revision>[^/?]+)(\?.*)?")
_FILE = re.compile(rf"/{_NAME}/resolve/(?P<revision>[^/]+)/(?P<file>[^?]+)")


class _Handler(BaseHTTPRequestHandler):
    models: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.models.asked.append(self.path)
        if page := self.models.pages.get(self.path):
            self._send(*page)
            return
        for pattern, answer in ((_INFO, self._info), (_TREE, self._tree), (_FILE, self._file)):
            if found := pattern.fullmatch(self.path):
                parts = found.groupdict()
                self._found(parts["model"], parts.get("revision") or "main", answer, parts)
                return
        self._send(404, b"{}")

    do_HEAD = do_GET

    def _found(self, model: str, revision: str, answer: Any, parts: dict[str, str]) -> None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        if not self.models.has(model, token):
            self._send(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif (found := self.models.find(model, revision)) is None:
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        else:
            answer(model, *found, parts)

    def _info(self, model: str, commit: str, files: Files, parts: dict[str, str]) -> None:
        siblings = [{"rfilename": name} for name in files]
        info = {"_id": "1", "id": model, "modelId": model, "sha": commit, "siblings": siblings}
        self._send(200, json.dumps({**info, "tags": [], "private": False}).encode())

    def _tree(self, model: str, commit: str, files: Files, parts: dict[str, str]) -> None:
        tree = [
            {"type": "file", "path": name, "size": len(content), "oid": _etag(content)}
            for name, content in files.items()
        ]
        self._send(200, json.dumps(tree).encode())

    def _file(self, model: str, commit: str, files: Files, parts: dict[str, str]) -> None:
        content = files.get(parts["file"])
        if content is None:
            named = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}
            self._send(404, b"", named)
        else:
            named = {"ETag": f'"{_etag(content)}"', "X-Repo-Commit": commit}
            self._send(200, content, named)

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


def _etag(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()
