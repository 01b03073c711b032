"""What a target answers, on its way to the client: whole events, and the model's name as asked.

What comes over a network is cut anywhere. The guard in front reads use from what passes and needs
each event of a stream, and the JSON of an answer, in one piece; so does a change of the name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from manta.serving.openai_errors import Message, Send

MAX_HELD_BYTES = 64 * 2**20
"""A larger answer, or event, passes in pieces, its model's name unchanged."""
SERVED_BY = b"x-manta-served-by"

# A quote inside a JSON string is escaped, so this matches no text that a model wrote.
_MODEL = re.compile(rb'("model"\s*:\s*)"(?:[^"\\]|\\.)*"')
_EVENT = re.compile(rb"\r?\n\r?\n")


class Relay:
    """Takes an answer's messages in place of the server's own `send`."""

    def __init__(
        self, send: Send, served_by: str, model: str | None, began: Callable[[], None]
    ) -> None:
        """
        Args:
            send: gets the messages.
            served_by: who answers, for the header `x-manta-served-by`.
            model: what the answer is to call its model; None leaves it.
            began: called when the answer's first byte is there.
        """
        self._send = send
        self._served_by = served_by
        self._name = None if model is None else rb"\g<1>" + _in_pattern(json.dumps(model))
        self._began = began
        self._held = bytearray()
        self._is_json = False
        self.is_stream = False
        """Whether events come, to which one more can be added."""

    async def send(self, message: Message) -> None:
        """Pass a message on, or hold it until there is more."""
        if message["type"] == "http.response.start":
            self._began()
            await self._send(self._start(message))
            return
        last = not message.get("more_body", False)
        body = self._whole(message.get("body", b""), last=last)
        if body or last:
            await self._send({"type": "http.response.body", "body": body, "more_body": not last})

    async def broke(self, error: bytes) -> None:
        """Tell a stream's client why it ends here. `error` is JSON."""
        if self.is_stream:
            event = b"data: " + error + b"\n\n"
            await self._send({"type": "http.response.body", "body": event, "more_body": True})

    def _start(self, message: Message) -> Message:
        headers = dict(message["headers"])
        content_type = headers.get(b"content-type", b"")
        plain = b"content-encoding" not in headers
        self.is_stream = plain and content_type.startswith(b"text/event-stream")
        self._is_json = plain and content_type.startswith(b"application/json")
        kept = [
            (name, value)
            for name, value in message["headers"]
            if name != SERVED_BY and not (name == b"content-length" and self._name)
        ]
        return {**message, "headers": [*kept, (SERVED_BY, self._served_by.encode())]}

    def _whole(self, body: bytes, *, last: bool) -> bytes:
        """What can go on now."""
        if not self.is_stream and not self._is_json:
            return body
        self._held += body
        if last or len(self._held) > MAX_HELD_BYTES:
            end = len(self._held)
        else:
            end = _end_of_events(self._held) if self.is_stream else 0
        ready = bytes(self._held[:end])
        del self._held[:end]
        if self._name is None or not ready:
            return ready
        if self._is_json:
            return _MODEL.sub(self._name, ready, count=1)
        return b"".join(_MODEL.sub(self._name, one, count=1) for one in _events(ready))


def _in_pattern(text: str) -> bytes:
    return text.encode().replace(b"\\", rb"\\")


def _end_of_events(data: bytearray) -> int:
    unix, windows = data.rfind(b"\n\n"), data.rfind(b"\r\n\r\n")
    return max(unix + 2 if unix >= 0 else 0, windows + 4 if windows >= 0 else 0)


def _events(data: bytes) -> list[bytes]:
    """Cut after each event."""
    ends = [found.end() for found in _EVENT.finditer(data)]
    return [data[a:b] for a, b in zip([0, *ends], [*ends, len(data)], strict=True)]
