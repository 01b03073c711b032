"""How many requests a replica lets in, and what it agrees on about that with the HAProxy in front.

HAProxy refuses within a millisecond what would wait in a busy replica's event loop for its
refusal. The guard keeps the same bound: HAProxy knows it from answers only, and new ones begin
without those that an older one still serves (cluster/haproxy.py).
"""

from __future__ import annotations

import os

from manta.cluster import haproxy
from manta.serving.openai_errors import Message, Send
from manta.serving.request.exchange import Scope, header_of

DEFAULT = 512
"""Of an application without an engine in its process."""
WAITING_PER_RUNNING = 1
"""As many may wait as run: whoever is let in waits about as long as one answer takes."""
ROOM, REFUSED = b"x-manta-room", b"x-manta-refused"
"""In an answer; in a request, how many HAProxy has refused since it last said so."""


class Room:
    """The bound of one replica."""

    def __init__(self, most: int | None, num_sequences: int | None = None) -> None:
        """
        Args:
            most: what the application's settings say.
            num_sequences: how many the engine runs at once; None where there is none.
        """
        if most is None:
            most = (1 + WAITING_PER_RUNNING) * num_sequences if num_sequences else DEFAULT
        self.most = most
        self._is_told = haproxy.refuses(os.environ)

    def told(self, send: Send) -> Send:
        """A `send` that tells HAProxy the bound with each answer, if there is one to tell."""
        if not self._is_told:
            return send

        async def send_told(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [*message.get("headers", ()), (ROOM, b"%d" % self.most)]
                message = {**message, "headers": headers}
            await send(message)

        return send_told

    def refused_before(self, scope: Scope) -> int:
        """How many HAProxy refused that nobody has heard of yet."""
        number = header_of(scope, REFUSED) if self._is_told else None
        return int(number) if number and number.isdigit() else 0
