"""A small chat page beside the model that it asks: files that hold no data and need no key.

The person types the key in; the page keeps it for its tab and sends it with what it asks, so that
everything behind the page is guarded as for any other client.
"""

from __future__ import annotations

from pathlib import Path

from manta.serving.openai_errors import Send

FOLDER = Path(__file__).with_name("chat")
ROUTE = "/chat"

_TYPES = {
    ".html": b"text/html; charset=utf-8",
    ".js": b"text/javascript; charset=utf-8",
    ".css": b"text/css; charset=utf-8",
    ".svg": b"image/svg+xml",
}
_HEADERS = [
    # Nothing from elsewhere, nothing inline: a model's words that became markup could do nothing.
    (
        b"content-security-policy",
        b"default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; "
        b"frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-cache"),
]


class ChatPage:
    """The page's files, read once. No other file can be asked for."""

    def __init__(self) -> None:
        files = {f"{ROUTE}/{file.name}": file for file in FOLDER.iterdir()}
        files[ROUTE] = files.pop(f"{ROUTE}/index.html")
        self._files = {
            path: (_TYPES[file.suffix], file.read_bytes()) for path, file in files.items()
        }

    def has(self, method: str, path: str) -> bool:
        """Whether the request is for a part of the page."""
        return method in ("GET", "HEAD") and path in self._files

    async def send(self, method: str, path: str, send: Send) -> None:
        """Answer with it."""
        kind, content = self._files[path]
        length = (b"content-length", str(len(content)).encode())
        headers = [(b"content-type", kind), length, *_HEADERS]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if method == "HEAD" else content})
