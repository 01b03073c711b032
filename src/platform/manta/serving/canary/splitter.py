"""In a replica of the running version: sends a share of its requests on to a candidate.

Nobody is worse off for it: what the candidate does not answer well, the running version answers,
as long as the client has seen nothing. In a replica of a candidate: marks its answers, and knows
copies from requests. Orders come from a deploy, see traffic.py.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace

from manta.errors import MantaError
from manta.serving.access.keys import USER_ROUTES
from manta.serving.apps.plan import CANDIDATE
from manta.serving.canary import traffic
from manta.serving.canary.traffic import Order, Seen
from manta.serving.forwarding.forward import (
    CutShort,
    Forwarder,
    Head,
    Headers,
    NotForwarded,
    Sent,
    Why,
)
from manta.serving.openai_errors import Message, Refused, Send
from manta.serving.request.exchange import SIGHT, Receive, Scope, header_of, path_of, secret_of
from manta.serving.request.question import Question
from manta.serving.telemetry.observer import CLIENT_GONE, GONE_STATUS, SENT_ON

POLL_S = 1.0
GRACE_S = 5.0
"""Longer than the candidate's own guard waits, so that it can say so itself."""
MAX_COPIES = 16
"""Copies under way at once; what is drawn beyond them is left out."""
VERSION = traffic.VERSION_HEADER.encode()
TOKEN = b"x-manta-shadow"
"""Header of a copy."""
REFUSED = frozenset({400, 404, 405, 413, 415, 422})
"""Statuses that may be the candidate's fault or the client's: the running version decides."""

Own = Callable[[Send], Awaitable[None]]

logger = logging.getLogger(__name__)


class Splitter:
    """What one guard knows of a candidate. All but `refresh` is called in the guard's loop."""

    def __init__(self, root: str, replica_id: str, application: str, limit_s: float) -> None:
        self._root, self._replica_id = root, replica_id
        self._is_candidate = application.endswith(CANDIDATE)
        self._limit_s = limit_s + GRACE_S
        self._order: Order | None = None
        self._heard_at = 0.0
        self._seen, self._told = Seen(), Seen()
        self._forwarder = Forwarder()
        self._waiting: set[asyncio.Timeout] = set()
        """Of requests that were sent on, and whose answers have not begun."""
        self._copies: set[asyncio.Task[None]] = set()

    # --- orders --------------------------------------------------------------------------

    async def watch(self) -> None:
        """Follow orders until cancelled."""
        while True:
            await asyncio.to_thread(self.refresh)
            self._abandon()
            await asyncio.sleep(POLL_S)

    def refresh(self) -> None:
        """Look for an order, and tell what became of the requests under it."""
        order, known = traffic.read_order(self._root, self._replica_id), self._order
        if order and (known is None or (order.token, order.number) != (known.token, known.number)):
            self._order, self._heard_at = order, time.monotonic()
        elif known and time.monotonic() - self._heard_at > traffic.EXPIRY_S:
            self._order = replace(known, weight=0.0, shadow=0.0, abandon=True)
        if order and self._order and not self._is_candidate:
            self._tell(replace(self._seen, number=self._order.number))

    def _tell(self, seen: Seen) -> None:
        if seen == self._told:
            return
        try:
            traffic.write_seen(self._root, self._replica_id, seen)
            self._told = seen
        except MantaError as error:  # the next look tries again
            logger.warning("what became of requests cannot be told: %s", error)

    def _abandon(self) -> None:
        now = asyncio.get_running_loop().time()
        for patience in self._waiting if self._order and self._order.abandon else ():
            patience.reschedule(now)

    async def stop(self) -> None:
        """End copies and connections."""
        for task in self._copies:
            task.cancel()
        await self._forwarder.close()

    # --- one request ---------------------------------------------------------------------

    def is_copy(self, scope: Scope) -> bool:
        """Whether the request is a copy of one that the running version has answered."""
        if not self._is_candidate or self._order is None:
            return False
        shown = header_of(scope, TOKEN)
        return shown is not None and hmac.compare_digest(shown, self._order.token.encode())

    def takes(self, scope: Scope) -> bool:
        """Whether the candidate is to answer this request."""
        order = self._order
        if order is None or not order.weight or not _asks_a_model(scope):
            return False
        secret = secret_of(scope) if order.by == "key" else None
        drawn = random.random() if secret is None else traffic.place(order.token, secret)
        return drawn < order.weight

    async def answer(
        self, scope: Scope, asked: Question, receive: Receive, send: Send, own: Own
    ) -> None:
        """Have the candidate answer; where it does not, the running version.

        Args:
            scope: as the client sent it.
            asked: the body.
            receive: tells when the client goes away.
            send: to the client.
            own: answers through the `send` that it is given, as if there were no candidate.

        Raises:
            Refused: no answer in time.
            CutShort: the answer broke off, and the client has seen its beginning.
        """
        failed = False
        self._note(num_open=1)
        try:
            sent = await self._sent_on(scope, asked, receive, send)
            failed = sent.status == 504
            scope[SIGHT].status = sent.status or GONE_STATUS
            scope[SIGHT].outcome = SENT_ON if sent.whole else CLIENT_GONE
        except NotForwarded as reason:
            failed = reason.head is None or _is_unmarked(reason.head) or reason.head.status >= 500
            heard = _Status(send)
            await own(heard)
            failed = failed or (heard.status or 500) < 400
        except (Refused, CutShort):
            failed = True
            raise
        finally:
            self._note(num_open=-1, num_sent=1, num_failed=failed)

    async def _sent_on(self, scope: Scope, asked: Question, receive: Receive, send: Send) -> Sent:
        """Raises NotForwarded, Refused if there is no answer in time, or CutShort."""
        deadline = asyncio.get_running_loop().time() + self._limit_s

        def begun() -> None:
            self._waiting.discard(patience)
            patience.reschedule(deadline)

        heard = _Status(send, begun)
        try:
            async with asyncio.timeout_at(deadline) as patience:
                self._waiting.add(patience)
                try:
                    return await self._forward(scope, asked, receive, heard, _is_declined)
                finally:
                    self._waiting.discard(patience)
        except TimeoutError:
            if heard.status is not None:
                raise CutShort("timeout") from None
            if self._order and self._order.abandon:
                raise NotForwarded(Why.SILENT) from None
            raise _late(self._limit_s) from None

    def copy(self, scope: Scope, asked: Question, status: int | None) -> None:
        """The request was answered here, with `status`: perhaps ask the candidate the same."""
        order = self._order
        if order is None or not order.shadow or status is None or not _asks_a_model(scope):
            return
        if len(self._copies) < MAX_COPIES and random.random() < order.shadow:
            task = asyncio.create_task(self._copied(scope, asked, status, order.token))
            self._copies.add(task)
            task.add_done_callback(self._copies.discard)

    def bills(self, status: int | None) -> bool:
        """Whether an answer counts as use: not one that the running version will replace."""
        return not self._is_candidate or (status is not None and status < 400)

    def marked(self, send: Send) -> Send:
        """In a candidate, a `send` that says so with each answer; else `send`."""
        if not self._is_candidate:
            return send

        async def send_marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [*message.get("headers", ()), (VERSION, b"candidate")]
                message = {**message, "headers": headers}
            await send(message)

        return send_marked

    async def _copied(self, scope: Scope, asked: Question, status: int, token: str) -> None:
        heard = _Status(_nowhere)
        failed = True
        try:
            async with asyncio.timeout(self._limit_s):
                headers = [(TOKEN, token.encode())]
                await self._forward(scope, asked, _never, heard, _is_unmarked, headers)
            failed = (heard.status or 0) >= 500 or (heard.status in REFUSED and status < 400)
        except (NotForwarded, CutShort, TimeoutError):
            pass
        finally:
            self._note(num_sent=1, num_failed=failed)

    async def _forward(
        self,
        scope: Scope,
        asked: Question,
        receive: Receive,
        send: Send,
        try_elsewhere: Callable[[Head], bool],
        headers: Headers = (),
    ) -> Sent:
        assert self._order is not None
        return await self._forwarder.forward(
            self._order.url + path_of(scope),
            scope,
            asked.sent or asked.body,
            receive,
            send,
            headers=headers,
            try_elsewhere=try_elsewhere,
        )

    def _note(self, *, num_open: int = 0, num_sent: int = 0, num_failed: int = 0) -> None:
        more = Seen(num_open=num_open, num_sent=num_sent, num_failed=num_failed)
        self._seen = self._seen.plus(more)


class _Status:
    """A `send` that notes the status of the answer."""

    def __init__(self, send: Send, begun: Callable[[], None] | None = None) -> None:
        self._send, self._begun = send, begun
        self.status: int | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            if self._begun:
                self._begun()
        await self._send(message)


def _asks_a_model(scope: Scope) -> bool:
    return scope["method"] == "POST" and path_of(scope) in USER_ROUTES


def _is_unmarked(head: Head) -> bool:
    return not head.get(VERSION)


def _is_declined(head: Head) -> bool:
    """A time-out is passed on: whoever has waited so long shall not wait once more."""
    failed = head.status >= 500 and head.status != 504
    return _is_unmarked(head) or failed or head.status in REFUSED


def _late(limit_s: float) -> Refused:
    return Refused(504, "timeout", f"no answer within {limit_s:g} s", kind="server_error")


async def _never() -> Message:
    await asyncio.Event().wait()
    raise AssertionError


async def _nowhere(message: Message) -> None:
    """Throws an answer away."""
