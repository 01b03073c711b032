"""Answers kept for identical deterministic requests of one key, in a replica's memory.

Nothing is kept from which an answer could be read without the API key itself: of that, this
process knows a hash only. Encryption key and index come from the secret that each request brings,
so what lies in memory (a core dump, swap) is ciphertext under a key that is not there, and another
API key can neither find an entry nor read it. A replica that starts, with whatever model content,
starts empty.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
import time
from collections import OrderedDict, deque
from dataclasses import dataclass

from manta.serving.openai_errors import Message, Send
from manta.spec.guard import CacheConfig

LARGEST_SHARE = 16
"""One answer may take this part of the cache; bounds what is held while answers pass by."""
ENTRY_BYTES = 500
"""Counted for each entry beside its ciphertext: index, nonce, tag and Python's objects."""
NONCE_BYTES = 12

_NOT_REPEATED = (b"x-request-id", b"date", b"content-length", b"transfer-encoding")
_FAULT = re.compile(rb'(?:^|\n)(?:data:)?\s*\{\s*"error"|"finish_reason"\s*:\s*"(?:abort|error)"')
_DONE = b"data: [DONE]"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A whole answer as its client saw it."""

    headers: tuple[tuple[bytes, bytes], ...]
    parts: tuple[bytes, ...]
    """Of its body; a stream comes again in the same parts."""
    age_s: float = 0.0

    async def send(self, send: Send) -> None:
        """Give it once more, and say so."""
        told = ((b"x-manta-cache", b"hit"), (b"age", str(int(self.age_s)).encode()))
        start = {"type": "http.response.start", "status": 200, "headers": [*self.headers, *told]}
        await send(start)
        for part in self.parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


@dataclass(frozen=True, kw_only=True, slots=True)
class _Entry:
    sealed: bytes
    """Nonce and ciphertext."""
    kept_at: float
    number: int


class ResponseCache:
    """Answers of one replica, the longest unused dropped first."""

    def __init__(self, config: CacheConfig) -> None:
        self._config = config
        self._salt = secrets.token_bytes(32)
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()
        self._by_age: deque[tuple[float, bytes, int]] = deque()
        self._number = 0
        self.num_bytes = 0
        """Held now, as counted against `max_bytes`."""
        self.generation = 0
        """Grows when what models answer may have changed."""

    def page(self, secret: bytes, request: bytes) -> Page:
        """Where the answer to `request`, asked with the API key `secret`, lies or will lie."""
        key = hmac.digest(self._salt, b"seal" + secret, hashlib.sha256)
        index_key = hmac.digest(self._salt, b"index" + secret, hashlib.sha256)
        return Page(self, key, hmac.digest(index_key, request, hashlib.sha256))

    def get(self, index: bytes, now: float) -> _Entry | None:
        """The entry, which now is the last to be dropped."""
        self.sweep(now)
        entry = self._entries.get(index)
        if entry:
            self._entries.move_to_end(index)
        return entry

    def put(self, index: bytes, sealed: bytes, now: float) -> None:
        """Keep it, in place of others if there is no room."""
        self.sweep(now)
        if len(sealed) + ENTRY_BYTES > self._config.max_bytes:
            return
        self._drop(index)
        self._number += 1
        self._entries[index] = _Entry(sealed=sealed, kept_at=now, number=self._number)
        self._by_age.append((now, index, self._number))
        self.num_bytes += len(sealed) + ENTRY_BYTES
        while self.num_bytes > self._config.max_bytes:
            self._drop(next(iter(self._entries)))

    def sweep(self, now: float | None = None) -> None:
        """Drop what is older than `ttl_s`."""
        oldest = (time.monotonic() if now is None else now) - self._config.ttl_s
        while self._by_age and self._by_age[0][0] <= oldest:
            _, index, number = self._by_age.popleft()
            if index in self._entries and self._entries[index].number == number:
                self._drop(index)

    def clear(self) -> None:
        """Forget everything, and what is being answered just now as well."""
        self._entries.clear()
        self._by_age.clear()
        self.num_bytes = 0
        self.generation += 1

    @property
    def max_answer_bytes(self) -> int:
        """A larger one is not kept."""
        return self._config.max_bytes // LARGEST_SHARE

    def _drop(self, index: bytes) -> None:
        entry = self._entries.pop(index, None)
        if entry:
            self.num_bytes -= len(entry.sealed) + ENTRY_BYTES


class Page:
    """One request's place in the cache: looked at first, then hears the answer and keeps it."""

    def __init__(self, cache: ResponseCache, key: bytes, index: bytes) -> None:
        self._cache = cache
        self._key = key
        self._index = index
        self._generation = cache.generation
        self._headers: list[tuple[bytes, bytes]] = []
        self._parts: list[bytes] | None = None
        """None while there is nothing to keep: no answer yet, or not one of that kind."""
        self._num_bytes = 0
        self.answer = self._find()
        """What was answered before."""

    def hear(self, message: Message) -> None:
        """A message of the answer passes on its way to the client."""
        if self.answer is not None:
            return
        if message["type"] == "http.response.start":
            self._headers = [(name.lower(), value) for name, value in message.get("headers", ())]
            self._parts = [] if message["status"] == 200 else None
        elif message["type"] != "http.response.body":
            self._parts = None
        elif self._parts is not None:
            self._hear_part(self._parts, message)

    def _hear_part(self, parts: list[bytes], message: Message) -> None:
        parts.append(bytes(message.get("body", b"")))
        self._num_bytes += len(parts[-1])
        if self._num_bytes > self._cache.max_answer_bytes:
            self._parts = None
        elif not message.get("more_body", False):
            self._parts = None
            self._keep(parts)

    def _keep(self, parts: list[bytes]) -> None:
        body = b"".join(parts)
        stream = dict(self._headers).get(b"content-type", b"").startswith(b"text/event-stream")
        cut = stream and not body.rstrip().endswith(_DONE)
        if cut or _FAULT.search(body) or self._generation != self._cache.generation:
            return
        headers = [
            [name.decode("latin-1"), value.decode("latin-1")]
            for name, value in self._headers
            if name not in _NOT_REPEATED
        ]
        head = json.dumps({"headers": headers, "sizes": [len(part) for part in parts]}).encode()
        self._cache.put(self._index, self._seal(head + b"\n" + body), time.monotonic())

    def _find(self) -> Answer | None:
        now = time.monotonic()
        entry = self._cache.get(self._index, now)
        if entry is None:
            return None
        head, _, body = self._open(entry.sealed).partition(b"\n")
        facts, parts, at = json.loads(head), [], 0
        for size in facts["sizes"]:
            parts.append(body[at : at + size])
            at += size
        headers = ((name.encode("latin-1"), v.encode("latin-1")) for name, v in facts["headers"])
        age_s = now - entry.kept_at
        return Answer(headers=tuple(headers), parts=tuple(p for p in parts if p), age_s=age_s)

    def _seal(self, data: bytes) -> bytes:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        nonce = secrets.token_bytes(NONCE_BYTES)
        return nonce + AESGCM(self._key).encrypt(nonce, data, self._index)

    def _open(self, sealed: bytes) -> bytes:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        nonce, ciphertext = sealed[:NONCE_BYTES], sealed[NONCE_BYTES:]
        return bytes(AESGCM(self._key).decrypt(nonce, ciphertext, self._index))
