"""Prompts and answers, where an application asks for them: sampled, redacted, for a stated time.

    prompts/until-2026-11-29T10/REPLICA-000001.jsonl

Each file is written once. The folder's name says until when, in UTC, so that every guard on this
storage can delete it, whatever its own settings, and a later change of the settings as well.
"""

from __future__ import annotations

import json
import logging
import random
import re
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from manta import storage
from manta.serving.guard.redact import MAX_DEPTH, Redactor
from manta.serving.openai_errors import Message
from manta.spec.guard import PromptLogConfig

FOLDER = "prompts"
MAX_ANSWER_BYTES = 2**20
"""Of a longer answer only this is written: that it was longer."""
MAX_WAITING_BYTES = 16 * 2**20
"""Held while the storage cannot be written; what comes then is not logged."""
FLUSH_S = 10.0
SWEEP_S = 600.0
HOUR_S, DAY_S = 3600, 24 * 3600

_UNTIL = re.compile(r"/until-(\d{4}-\d\d-\d\dT\d\d)/[^/]+$")
_TEXTS = ("text", "content", "reasoning", "reasoning_content", "refusal")

logger = logging.getLogger(__name__)


class Record:
    """One request and its answer, as it passes."""

    def __init__(self, log: PromptLog, key_id: str, path: str, body: bytes) -> None:
        self._log = log
        self._facts: dict[str, Any] = {"at": time.time(), "key_id": key_id, "path": path}
        self._body = body
        self._status: int | None = None
        self._stream = False
        self._answer = bytearray()
        self._too_long = False
        self._ended = False

    def hear(self, message: Message) -> None:
        """A message of the answer passes on its way to the client."""
        if message["type"] == "http.response.start":
            self._status = message["status"]
            headers = {name.lower(): value for name, value in message.get("headers", ())}
            self._stream = headers.get(b"content-type", b"").startswith(b"text/event-stream")
        elif message["type"] == "http.response.body":
            self._ended = not message.get("more_body", False)
            if len(self._answer) + len(message.get("body", b"")) > MAX_ANSWER_BYTES:
                self._too_long = True
            else:
                self._answer += message.get("body", b"")

    def close(self) -> None:
        """Nothing more comes."""
        self._log.add(self)

    @property
    def num_bytes(self) -> int:
        """Held in memory."""
        return len(self._body) + len(self._answer)

    def line(self, redactor: Redactor) -> str | None:
        """As it is written; None if there is no prompt in it."""
        try:
            request = json.loads(self._body)
        except (ValueError, RecursionError):
            return None  # a form with sound, or no JSON: nothing that could be redacted
        left_out = f"[over {MAX_ANSWER_BYTES} bytes]"
        answer = left_out if self._too_long else redactor.value(self._texts())
        facts = {**self._facts, "status": self._status, "whole": self._ended, "answer": answer}
        return json.dumps({**facts, "request": redactor.value(_without_media(request))})

    def _texts(self) -> list[str]:
        """What each choice says, put together before it is redacted."""
        texts: dict[tuple[int, str], str] = {}
        for value in self._values():
            choices = value.get("choices") if isinstance(value, dict) else None
            for choice in choices if isinstance(choices, list) else ():
                for at, text in _said(choice):
                    texts[at] = texts.get(at, "") + text
        return list(texts.values())

    def _values(self) -> Iterator[Any]:
        lines = bytes(self._answer).split(b"\n") if self._stream else [bytes(self._answer)]
        for line in lines:
            try:
                yield json.loads(line.removeprefix(b"data:"))
            except (ValueError, RecursionError):
                continue  # [DONE], a line between events, an event that was cut


class PromptLog:
    """What one replica writes; without a config it only deletes what has had its time."""

    def __init__(self, root: str, config: PromptLogConfig | None) -> None:
        self._root = root
        self._config = config
        self._writer = uuid.uuid4().hex
        self._redactor = Redactor(config.redact, config.patterns) if config else None
        self._waiting: list[Record] = []
        self._num_bytes = 0
        self._number = 0
        self._flushed_at = self._swept_at = float("-inf")

    def record(self, key_id: str, path: str, body: bytes) -> Record | None:
        """Hears a request's answer if this one is drawn; None for all others."""
        if self._config is None or not body or random.random() >= self._config.sample:
            return None
        return Record(self, key_id, path, body)

    def add(self, record: Record) -> None:
        """Have it written with the next `work`."""
        if self._num_bytes + record.num_bytes <= MAX_WAITING_BYTES:
            self._waiting.append(record)
            self._num_bytes += record.num_bytes

    def work(self, *, last: bool = False) -> None:
        """Write what waits and delete what has had its time, if it is time for that. Blocks.

        Raises:
            MantaError: the storage cannot be read or written; nothing is forgotten then.
        """
        now = time.time()
        if self._waiting and (last or now - self._flushed_at >= FLUSH_S):
            self._flushed_at = now
            self._write(now)
        if now - self._swept_at >= SWEEP_S:
            self._swept_at = now
            sweep(self._root, now)

    def _write(self, now: float) -> None:
        assert self._config is not None
        assert self._redactor is not None
        records, self._waiting, self._num_bytes = self._waiting, [], 0
        lines = [line for record in records if (line := record.line(self._redactor))]
        if not lines:
            return
        self._number += 1
        # Rounded down: nothing is kept longer than was said.
        until = datetime.fromtimestamp(now + self._config.keep_days * DAY_S, UTC)
        name = f"{self._writer}-{self._number:06}.jsonl"
        url = storage.join(self._root, FOLDER, f"until-{until:%Y-%m-%dT%H}", name)
        try:
            storage.write_bytes(url, "".join(f"{line}\n" for line in lines).encode())
        except Exception:
            for record in records:
                self.add(record)
            raise


def sweep(root: str, now: float) -> None:
    """Delete what has had its time. Raises MantaError if the storage cannot be read or written."""
    for url in storage.glob(storage.join(root, FOLDER)):
        told = _UNTIL.search(url)
        if told and datetime.fromisoformat(f"{told[1]}:00+00:00").timestamp() <= now:
            storage.delete(url)


def _said(choice: Any) -> Iterator[tuple[tuple[int, str], str]]:
    """Texts of a choice, or of a piece of it in a stream, with where each belongs."""
    if not isinstance(choice, dict):
        return
    said = choice.get("delta") or choice.get("message") or choice
    number = _whole(choice.get("index"), 0)
    if not isinstance(said, dict):
        return
    for name in _TEXTS:
        if isinstance(said.get(name), str):
            yield (number, name), said[name]
    calls = said.get("tool_calls")
    for place, call in enumerate(calls if isinstance(calls, list) else ()):
        function = call.get("function") if isinstance(call, dict) else None
        for name, text in function.items() if isinstance(function, dict) else ():
            if isinstance(text, str):
                yield (number, f"{name} {_whole(call.get('index'), place)}"), text


def _whole(value: Any, default: int) -> int:
    return value if isinstance(value, int) else default


def _without_media(value: Any, depth: int = 0) -> Any:
    """Pictures and sound cannot be redacted; how large they were is enough."""
    if depth > MAX_DEPTH:
        return "[nested too deep]"
    if isinstance(value, dict):
        return {
            name: f"[{len(part)} characters]"
            if isinstance(part, str) and (name == "data" or part.startswith("data:"))
            else _without_media(part, depth + 1)
            for name, part in value.items()
        }
    if isinstance(value, list):
        return [_without_media(part, depth + 1) for part in value]
    return value
