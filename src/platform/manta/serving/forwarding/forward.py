"""An HTTP request as ASGI tells it, sent on to another address; the answer streams back.

Nothing is held back but the head of an answer, until its body has begun. So whoever asks can try
another address as long as the client has seen nothing; after that an answer that breaks off stays
broken. The upstream connection is closed as soon as the client goes away, which frees the place
that the request has in an engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from types import SimpleNamespace, TracebackType

import aiohttp
from multidict import CIMultiDict
from yarl import URL

from manta.serving.openai_errors import Send
from manta.serving.request.exchange import Receive, Scope

Headers = Iterable[tuple[bytes, bytes]]

CONNECT_TIMEOUT_S = 2.0
IDLE_CONNECTION_S = 30.0
"""How long a connection that nobody uses is kept for the next request."""
MAX_HEADER_BYTES = 65_536
"""Longest header of an answer."""

_OF_ONE_HOP = frozenset(
    {
        *(b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization"),
        *(b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade"),
    }
)
"""Source: RFC 9110, section 7.6.1; each hop makes its own."""
_NOT_ASKED = _OF_ONE_HOP | {b"host", b"content-length", b"expect"}
_NOT_ANSWERED = _OF_ONE_HOP | {b"date", b"server"}
_ALL_BY_US = ("Accept", "Accept-Encoding", "Content-Type", "User-Agent")
"""What aiohttp adds unless told otherwise."""
_LARGE_BYTES = 2**20
"""A larger body is written in parts, so that others get their turn."""


class Why(StrEnum):
    """Why nothing of an answer has gone to the client."""

    UNREACHABLE = "unreachable"
    """No connection, or it ended before the answer's head."""
    SILENT = "silent"
    """No byte of the answer's body in time."""
    BROKEN = "broken"
    """The answer ended after its head, before its body began."""
    STATUS = "status"
    """It answered with a status after which another is to be tried."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """The beginning of an answer."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    """Names in lower case, without those of one hop only."""

    def get(self, name: bytes) -> bytes:
        """The header's first value; empty if there is none."""
        return next((value for key, value in self.headers if key == name), b"")


class NotForwarded(Exception):
    """The client has seen nothing yet: another address may be tried."""

    def __init__(self, why: Why, head: Head | None = None) -> None:
        super().__init__(f"{why} {head.status}" if head else str(why))
        self.why = why
        self.head = head
        """Of the answer that is not passed on; None if there was none."""


class CutShort(Exception):
    """The answer broke off after its beginning had gone to the client. Let it pass through to the
    server, which then ends the client's connection in a way that it can notice.
    """


@dataclass(frozen=True, kw_only=True, slots=True)
class Sent:
    """What has gone to the client."""

    status: int | None
    """None if it went away before the answer began."""
    whole: bool
    """False if the client went away before the end."""
    first_byte_s: float | None
    """From the call to the first byte of the answer's body."""


def is_down(head: Head) -> bool:
    """Whether this answer says that nobody is there.

    Serve's proxy says 500 or 503 where no replica is, and 404 as plain text where no route is;
    an application that is there answers in JSON.
    """
    if head.status in (502, 503, 504):
        return True
    return head.status in (404, 500) and not head.get(b"content-type").startswith(
        b"application/json"
    )


@dataclass(frozen=True, slots=True)
class _Answer:
    response: aiohttp.ClientResponse
    head: Head
    chunk: bytes
    """The first of the body; empty if it has none."""


class Forwarder:
    """Sends requests on, and keeps connections for the next. One for an event loop."""

    def __init__(self, connect_timeout_s: float = CONNECT_TIMEOUT_S) -> None:
        self._connect_timeout_s = connect_timeout_s
        self._pool: aiohttp.ClientSession | None = None
        self._new_only: aiohttp.ClientSession | None = None
        """Its connections serve one request each."""

    async def close(self) -> None:
        """End all connections."""
        for session in (self._pool, self._new_only):
            if session is not None:
                await session.close()
        self._pool = self._new_only = None

    async def forward(
        self,
        url: str,
        scope: Scope,
        body: bytes,
        receive: Receive,
        send: Send,
        *,
        headers: Headers = (),
        first_byte_timeout_s: float | None = None,
        try_elsewhere: Callable[[Head], bool] = is_down,
    ) -> Sent:
        """Ask `url` what the client asks, and send the client what it answers.

        Args:
            url: the whole address; the request's query is added.
            scope: method, query and headers are taken from it.
            body: of the request, already read.
            receive: tells when the client goes away, and nothing else any more.
            send: gets the answer; what it raises passes through.
            headers: in place of the request's own of the same names.
            first_byte_timeout_s: longest time to the first byte of the answer's body.
            try_elsewhere: whether an answer with this head is not to be passed on.

        Raises:
            NotForwarded: nothing has been sent.
            CutShort: the answer's beginning has.
        """
        began = time.monotonic()
        status = first_byte_s = None
        async with _WhileThere(receive) as client:
            answer = await self._begin(
                url, scope, body, headers, first_byte_timeout_s, try_elsewhere
            )
            status, first_byte_s = answer.head.status, time.monotonic() - began
            await _pass_on(answer, send)
        if not client.gone:
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        return Sent(status=status, whole=not client.gone, first_byte_s=first_byte_s)

    async def _begin(
        self,
        url: str,
        scope: Scope,
        body: bytes,
        headers: Headers,
        timeout_s: float | None,
        try_elsewhere: Callable[[Head], bool],
    ) -> _Answer:
        response = None
        try:
            async with asyncio.timeout(timeout_s):
                response = await self._ask(url, scope, body, headers)
                head = _head(response)
                if try_elsewhere(head):
                    raise NotForwarded(Why.STATUS, head)
                return _Answer(response, head, await response.content.readany())
        except BaseException as error:
            if response is not None:
                response.close()
            if isinstance(error, aiohttp.ClientError | OSError):
                raise _not_forwarded(error, response) from error
            raise

    async def _ask(
        self, url: str, scope: Scope, body: bytes, headers: Headers
    ) -> aiohttp.ClientResponse:
        """Returns when the answer's head is there.

        A connection that was kept may have been closed by the other side while this request was
        on its way; then it is sent again on a new one, once.
        """
        kept = SimpleNamespace(is_used=False)
        try:
            return await self._request(self._session(), url, scope, body, headers, kept)
        except aiohttp.ClientConnectorError:
            raise
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
            if not kept.is_used:
                raise
        return await self._request(self._session(new=True), url, scope, body, headers, kept)

    async def _request(
        self,
        session: aiohttp.ClientSession,
        url: str,
        scope: Scope,
        body: bytes,
        headers: Headers,
        kept: SimpleNamespace,
    ) -> aiohttp.ClientResponse:
        query = bytes(scope.get("query_string", b"")).decode("latin-1")
        return await session.request(
            scope["method"],
            URL(f"{url}?{query}" if query else url, encoded=True),
            data=io.BytesIO(body) if len(body) > _LARGE_BYTES else body or None,
            headers=_request_headers(scope, headers),
            allow_redirects=False,
            trace_request_ctx=kept,
        )

    def _session(self, *, new: bool = False) -> aiohttp.ClientSession:
        if self._pool is None or self._new_only is None:
            self._pool = self._open(_kept_connections())
            self._new_only = self._open(aiohttp.TCPConnector(limit=0, force_close=True))
        return self._new_only if new else self._pool

    def _open(self, connector: aiohttp.TCPConnector) -> aiohttp.ClientSession:
        reuse = aiohttp.TraceConfig()
        reuse.on_connection_reuseconn.append(_note_reuse)
        return aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, connect=self._connect_timeout_s),
            auto_decompress=False,
            skip_auto_headers=_ALL_BY_US,
            trace_configs=[reuse],
            max_line_size=MAX_HEADER_BYTES,
            max_field_size=MAX_HEADER_BYTES,
        )


def _kept_connections() -> aiohttp.TCPConnector:
    return aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_CONNECTION_S)


async def _note_reuse(
    session: aiohttp.ClientSession,
    context: SimpleNamespace,
    parameters: aiohttp.TraceConnectionReuseconnParams,
) -> None:
    context.trace_request_ctx.is_used = True


class _WhileThere:
    """What is done inside ends, without an error, when the client goes away."""

    def __init__(self, receive: Receive) -> None:
        self.gone = False
        self._receive = receive
        self._end = asyncio.timeout(None)
        self._watch: asyncio.Task[None] | None = None

    async def __aenter__(self) -> _WhileThere:
        await self._end.__aenter__()
        self._watch = asyncio.create_task(self._look())
        return self

    async def _look(self) -> None:
        with contextlib.suppress(Exception):  # who cannot be heard is gone as well
            while (await self._receive())["type"] != "http.disconnect":
                pass
        self.gone = True
        self._end.reschedule(asyncio.get_running_loop().time())

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        assert self._watch is not None
        self._watch.cancel()
        try:
            await self._end.__aexit__(kind, error, trace)
        except TimeoutError:
            return True
        return False


def _request_headers(scope: Scope, headers: Headers) -> CIMultiDict[str]:
    given = [(name.lower(), value) for name, value in headers]
    ours = {name for name, _ in given}
    asked = [(name, value) for name, value in scope["headers"] if name.lower() not in ours]
    return CIMultiDict(
        (name.decode("latin-1"), value.decode("latin-1"))
        for name, value in [*_without(asked, _NOT_ASKED), *given]
    )


def _head(response: aiohttp.ClientResponse) -> Head:
    return Head(
        status=response.status,
        headers=tuple(_without(response.raw_headers, _NOT_ANSWERED)),
    )


def _without(headers: Headers, unwanted: frozenset[bytes]) -> list[tuple[bytes, bytes]]:
    """Names in lower case; without `unwanted`, and what `connection` names."""
    lowered = [(bytes(name).lower(), bytes(value)) for name, value in headers]
    named = [value for name, value in lowered if name == b"connection"]
    of_this_hop = {word.strip().lower() for value in named for word in value.split(b",")}
    left_out = unwanted | of_this_hop
    return [(name, value) for name, value in lowered if name not in left_out]


def _not_forwarded(error: Exception, response: aiohttp.ClientResponse | None) -> NotForwarded:
    if isinstance(error, TimeoutError) and not isinstance(error, aiohttp.ClientError):
        return NotForwarded(Why.SILENT)
    return NotForwarded(Why.BROKEN if response is not None else Why.UNREACHABLE)


async def _pass_on(answer: _Answer, send: Send) -> None:
    """All but the last, empty message. Raises CutShort if the answer breaks off."""
    head, chunk = answer.head, answer.chunk
    start = {"status": head.status, "headers": list(head.headers)}
    try:
        await send({"type": "http.response.start", **start})
        while chunk:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
            chunk = await _next(answer.response)
    finally:
        answer.response.close()  # one that was read to its end keeps its connection


async def _next(response: aiohttp.ClientResponse) -> bytes:
    """The next part of the body; empty at its end. Raises CutShort if it breaks off."""
    try:
        return await response.content.readany()
    except (aiohttp.ClientError, OSError) as error:
        raise CutShort(str(error) or type(error).__name__) from error
