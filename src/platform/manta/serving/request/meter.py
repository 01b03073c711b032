"""Reads from an answer on its way out what the engine counted."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable
from typing import Any

from manta.serving.openai_errors import Message, Send
from manta.serving.request.pace import Pace
from manta.serving.request.question import Question

SOUND_TOKENS_PER_S = 50
"""Where an engine tells seconds only: what Whisper's encoder makes of one."""

_USAGE = re.compile(rb'"usage"\s*:\s*\{')
_NO_CHOICES = re.compile(rb'"choices"\s*:\s*\[\s*\]')
_DECODER = json.JSONDecoder()


class Meter:
    """Stands between the application and the client; passes everything on as it comes.

    Neither an event of a stream nor the JSON of an answer spans two messages: Ray and vLLM send
    them whole.
    """

    def __init__(self, send: Send, question: Question) -> None:
        self._send = send
        self.listeners: list[Callable[[Message], None]] = []
        """Told of each message before it goes to the client."""
        self._question = question
        self._is_stream = False
        self._usage: dict[str, Any] | None = None
        self._num_events = 0
        self.status: int | None = None
        """HTTP status; None before the answer has begun."""
        self.ended = False
        self.cut = False
        """Set by whoever ends an answer before its end."""
        self._started = time.monotonic()
        self.first_byte_s: float | None = None
        """From here to the first byte of the answer's body; None before it."""
        self.broke = False
        """Whether the engine ended a stream with an error, which has no status any more."""
        self.pace = Pace()
        self.cached = False
        """Whether the answer is one of before: no engine worked for it."""

    async def send(self, message: Message) -> None:
        """What the application calls in place of the server's own `send`."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = dict(message.get("headers", ()))
            self._is_stream = headers.get(b"content-type", b"").startswith(b"text/event-stream")
        elif message["type"] == "http.response.body":
            self.ended = not message.get("more_body", False)
            if self.first_byte_s is None and message.get("body"):
                self.first_byte_s = time.monotonic() - self._started
            message = self._read(message)
        for hear in self.listeners:
            hear(message)
        await self._send(message)

    def _read(self, message: Message) -> Message:
        body: bytes = message.get("body", b"")
        if not self._is_stream:
            self._usage = _last_usage(body) or self._usage
            return message
        self._num_events += body.count(b"data: ")
        if not _USAGE.search(body):
            self._pass(body)
            return message
        if not _NO_CHOICES.search(body):  # use with each event, as the client asked
            self._pass(body)
        kept = [event for event in body.split(b"\n\n") if not self._is_ours(event)]
        return {**message, "body": b"\n\n".join(kept)}

    def _pass(self, body: bytes) -> None:
        what = body[6:14]  # after `data: `
        if what == b'{"error"':
            self.broke = True
        elif body and what != b"[DONE]\n\n":
            self.pace.note(body)

    def _is_ours(self, event: bytes) -> bool:
        """Note what the event says of use; whether it came only because we asked for it."""
        if (usage := _last_usage(event)) is None:
            return False
        self._usage = usage
        return self._question.hide_usage and bool(_NO_CHOICES.search(event))

    def tokens(self) -> tuple[int, int]:
        """Prompt and completion tokens of the answer.

        What was cut ends before the engine says what it counted; then the prompt counts as
        estimated, and each event of a stream as a token. Leaving early must not be free. Sounds
        count so wherever the answer does not tell.
        """
        if self.cached:
            return 0, 0
        if self._usage is not None:
            used = self._usage
            if used.get("type") == "duration":
                return _number(used, "seconds") * SOUND_TOKENS_PER_S, 0
            return _number(used, "prompt_tokens"), _number(used, "completion_tokens")
        counts_itself = self._is_stream or self._question.is_sound
        if self.status is None or (counts_itself and self.status == 200):
            return self._question.num_prompt_tokens, self._num_events
        return 0, 0


def _last_usage(data: bytes) -> dict[str, Any] | None:
    # A quote inside a JSON string is escaped, so this matches no text that a model wrote.
    found = list(_USAGE.finditer(data))
    if not found:
        return None
    try:
        value, _ = _DECODER.raw_decode(data[found[-1].end() - 1 :].decode())
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _number(usage: dict[str, Any], name: str) -> int:
    value = usage.get(name)
    return math.ceil(value) if isinstance(value, int | float) else 0
