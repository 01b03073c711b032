"""The web page of the queue: files that hold no data, and headers that keep the browser strict.

The page asks for a key and then reads the HTTP API with it, so the files themselves need none.
"""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

FOLDER = Path(__file__).with_name("web")

HEADERS = {
    # Nothing from elsewhere, nothing inline: text that became markup after all could do nothing.
    "Content-Security-Policy": "default-src 'self'; object-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def add(api: FastAPI) -> None:
    """Serve the page at `/` and its parts under `/web`; every answer gets the headers."""
    api.add_middleware(_Strict)
    api.mount("/web", StaticFiles(directory=FOLDER), name="web")

    @api.get("/", include_in_schema=False)
    def page() -> FileResponse:
        """The page."""
        return FileResponse(FOLDER / "index.html")


class _Strict:
    """Sets the headers; data is never kept by the browser, the page's parts are asked for anew."""

    def __init__(self, inner: ASGIApp) -> None:
        self._inner = inner

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_data = scope.get("path", "").startswith("/api/")

        async def strict(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
                headers["Cache-Control"] = "no-store" if is_data else "no-cache"
            await send(message)

        await self._inner(scope, receive, strict)
