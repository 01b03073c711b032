"""ASGI applications on real ports of this machine, for tests of what lies between them."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvicorn


def listening() -> socket.socket:
    """A socket on a free port."""
    # asyncio turns Nagle's delay (40 ms with a late ACK) off only where the protocol is named.
    made = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.bind(("127.0.0.1", 0))
    return made


@asynccontextmanager
async def served(app: Any, **options: Any) -> AsyncIterator[str]:
    """Its base URL, while it answers."""
    made = listening()
    config = uvicorn.Config(app, log_level="critical", lifespan="off", **options)
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve([made]))
    try:
        while not server.started:
            await asyncio.sleep(0.005)
        yield f"http://127.0.0.1:{made.getsockname()[1]}"
    finally:
        server.should_exit = server.force_exit = True
        await task
        made.close()


async def until(ready: Any, timeout_s: float = 10.0) -> None:
    """Wait until `ready()` holds. Raises TimeoutError."""
    async with asyncio.timeout(timeout_s):
        while not ready():
            await asyncio.sleep(0.005)
