"""The guard of an LLM application: an ASGI application around the one that answers.

Being outermost it sees every route, also those that a new vLLM or Ray adds. What it does not
know it lets only administrators call. In order, so that each refusal costs as little as it can:
the key, from the headers; room; the body and its bounds; the model; the key's limits.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from typing import Any

from manta.serving.access.key_store import KeyTable
from manta.serving.access.keys import USER_ROUTES, Key
from manta.serving.access.usage import Ledger
from manta.serving.canary.splitter import Splitter
from manta.serving.guard.cache import Page, ResponseCache
from manta.serving.guard.chat_page import ChatPage
from manta.serving.guard.chores import Chores
from manta.serving.guard.limiter import Limiter
from manta.serving.guard.prompt_log import PromptLog
from manta.serving.guard.room import Room
from manta.serving.openai_errors import (
    Refused,
    Send,
    bad_request,
    no_key,
    not_allowed,
    overloaded,
)
from manta.serving.request import question
from manta.serving.request.exchange import (
    MODEL,
    SIGHT,
    Receive,
    Scope,
    again,
    header_of,
    inner,
    path_of,
    read_body,
    secret_of,
    too_large,
)
from manta.serving.request.meter import Meter
from manta.serving.request.question import Question
from manta.serving.telemetry.observer import Observer, Sight
from manta.serving.telemetry.vitals import VitalsWriter
from manta.spec.guard import GuardConfig, Limits

App = Callable[[Any, Receive, Send], Awaitable[None]]

BODYLESS = ("GET", "HEAD")
ANSWER_HEADERS = (b"accept", b"accept-encoding", b"content-type", b"serve_multiplexed_model_id")
"""What an answer may depend on beside the body."""
SOUNDS = "/v1/audio/"
JSON_ROUTES = frozenset(path for path in USER_ROUTES if not path.startswith(SOUNDS))
"""Routes that take no form: what is in one would pass unread."""
_UNLIMITED = Limits()


class Guard:
    """Lets a request through to `app` if its key, its size and its limits allow it."""

    def __init__(
        self,
        app: App,
        config: GuardConfig,
        table: KeyTable,
        limiter: Limiter,
        ledger: Ledger,
        vitals: VitalsWriter | None = None,
        observer: Observer | None = None,
        split: Splitter | None = None,
        application: str = "",
        num_sequences: int | None = None,
    ) -> None:
        self.app = app
        self.room = Room(config.max_requests_in_flight, num_sequences)
        self._config = config
        self._table = table
        self._limiter = limiter
        self._ledger = ledger
        self._vitals = vitals
        self._observer = observer or Observer()
        self._split = split
        self._cache = ResponseCache(config.cache) if config.cache else None
        self._chat = ChatPage() if config.chat_page else None
        self._prompts = PromptLog(table.root, config.log_prompts)
        self._in_flight = 0
        self._chores = Chores(
            config=config,
            room=self.room.most,
            application=application,
            table=table,
            limiter=limiter,
            ledger=ledger,
            prompts=self._prompts,
            observer=self._observer,
            vitals=vitals,
            cache=self._cache,
            split=split,
        )
        self._waits = self._chores.waits
        self.judge = self._chores.judge

    def add_exception_handler(self, *arguments: Any) -> None:
        """Ray Serve teaches FastAPI applications its own exceptions this way."""
        if hasattr(self.app, "add_exception_handler"):
            self.app.add_exception_handler(*arguments)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, as ASGI has it."""
        if scope["type"] == "lifespan":
            await self._live(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008, "reason": "not served here"})
        else:
            await self._observed(scope, receive, send)

    async def _observed(self, scope: Scope, receive: Receive, send: Send) -> None:
        sight = self._observer.begin()
        send = self.room.told(self._split.marked(send) if self._split else send)
        if number := self.room.refused_before(scope):
            self._observer.refused_before(number)
        try:
            await self._chores.start()
            await self._check({**scope, SIGHT: sight}, receive, send)
        except Refused as refusal:
            sight.refused(refusal)
            await refusal.send(send)
        except BaseException as error:
            sight.failed(error)
            raise
        finally:
            self._observer.end(sight)

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._chores.start()
        try:
            await self.app(scope, receive, send)
        finally:
            await self.stop()

    async def stop(self) -> None:
        """End the background work and write what is not yet written."""
        await self._chores.stop()

    # --- one request ---------------------------------------------------------------------

    async def _check(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = path_of(scope)
        if self._chat and self._chat.has(scope["method"], path):
            await self._chat.send(scope["method"], path, send)
            return
        key = self._key(scope, path) if self._config.keys == "required" else None
        takes_room = scope["method"] not in BODYLESS  # metrics are most needed when it is full
        if takes_room and self._in_flight >= self.room.most:
            raise overloaded("too many requests are being answered or wait; try again")
        self._in_flight += takes_room
        try:
            asked = await self._question(scope, path, receive)
            if key is not None:
                _check_model(key, asked.model, path)
            await self._shared(key, asked, scope, receive, send)
        finally:
            self._in_flight -= takes_room

    def _key(self, scope: Scope, path: str) -> Key:
        if not self._table.loaded:
            raise overloaded("keys are not known yet; try again")
        secret = secret_of(scope)
        if secret is None:
            raise no_key("no API key; send `Authorization: Bearer KEY`")
        stored = self._table.find(secret)
        if stored is None:
            raise no_key("this API key is not known")
        if not stored.alive(time.time()):
            raise no_key("this API key is revoked or has expired")
        if not stored.key.may_call(scope["method"], path):
            raise not_allowed(f"a key of role `{stored.key.role}` may not call this route")
        return stored.key

    async def _question(self, scope: Scope, path: str, receive: Receive) -> Question:
        """The body, read whole and within its bounds."""
        if scope["method"] in BODYLESS:
            return Question(body=b"")
        most = self._config.max_body_bytes
        declared = header_of(scope, b"content-length")
        if declared is not None and (not declared.isdigit() or int(declared) > most):
            raise too_large(most)
        try:
            async with asyncio.timeout(self._config.body_timeout_s):
                body = await read_body(receive, most)
        except TimeoutError:
            raise Refused(408, "request_timeout", "the request did not arrive in time") from None
        content_type = header_of(scope, b"content-type") or b"application/json"
        is_form = content_type.lower().startswith((b"multipart/", b"application/x-www-form"))
        if is_form and path in JSON_ROUTES:
            raise Refused(415, "unsupported_media_type", "send JSON, as `application/json`")
        if is_form and path.startswith(SOUNDS):
            return question.read_form(scope, body, self._config)
        if not body or is_form:
            return Question(body=body)
        return question.read(body, path, self._config)

    async def _shared(
        self, key: Key | None, asked: Question, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Answered here, or by a candidate, whose guard then keeps the limits and counts."""
        split = self._split
        if split and split.takes(scope):
            own = partial(self._limited, key, asked, scope, receive)
            await split.answer(scope, asked, receive, send, own)
        elif split and split.is_copy(scope):
            copied = replace(asked, is_copy=True, repeatable=False)
            await self._limited(None, copied, scope, receive, send)
        else:
            await self._limited(key, asked, scope, receive, send)

    async def _limited(
        self, key: Key | None, asked: Question, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Within the key's limits, and whatever happens its use is noted and its slot freed."""
        limits = _limits(key, self._config.default_limits) if key else _UNLIMITED
        page = self._page(scope, asked)
        meter = Meter(send, asked)
        self._observer.let_in(scope, key, asked.model, meter)
        if page and page.answer:
            asked = replace(asked, num_prompt_tokens=0, max_completion_tokens=0)
        if key is None or limits == _UNLIMITED:
            await self._metered(key, asked, scope, receive, meter, page)
            return
        grant_id = uuid.uuid4().hex
        most = asked.num_prompt_tokens, asked.max_completion_tokens
        try:
            usd = self._ledger.cost_usd(asked.model or "", *most)
            denial = await self._limiter.acquire(grant_id, key.id, limits, sum(most), usd)
            if denial:
                raise Refused(
                    429,
                    denial.code,
                    denial.message,
                    kind=denial.code,
                    retry_after_s=denial.retry_after_s,
                )
            await self._metered(key, asked, scope, receive, meter, page)
        finally:  # a cancelled `acquire` may have been granted: finishing it is always right
            usd = self._ledger.cost_usd(_served(asked, meter), *meter.tokens())
            self._limiter.finish(grant_id, sum(meter.tokens()), usd)

    def _page(self, scope: Scope, asked: Question) -> Page | None:
        """Where the request's answer may lie; None if it must come from the application."""
        wanted = header_of(scope, b"cache-control") or b""
        if not self._cache or not asked.repeatable or b"no-" in wanted:
            return None
        secret = secret_of(scope)
        assert secret is not None  # with a cache, keys are required
        about = [path_of(scope).encode(), bytes(scope.get("query_string", b""))]
        about += [header_of(scope, name) or b"" for name in ANSWER_HEADERS]
        # A stream's use is hidden from a client that did not ask for it itself.
        about += [b"hidden" if asked.hide_usage else b"", asked.body]
        return self._cache.page(secret, b"\0".join(about))

    async def _metered(
        self,
        key: Key | None,
        asked: Question,
        scope: Scope,
        receive: Receive,
        meter: Meter,
        page: Page | None,
    ) -> None:
        sight: Sight = scope[SIGHT]
        sight.admitted_at = time.perf_counter()
        failed = False
        record = None
        if not asked.is_copy:
            record = self._prompts.record(key.id if key else "", path_of(scope), asked.body)
        meter.listeners += [one.hear for one in (page, record) if one]
        try:
            if page and page.answer:
                meter.cached = True
                await page.answer.send(meter.send)
            else:
                if scope["method"] not in BODYLESS:
                    self._waits.begin(meter, time.monotonic())
                inside = {**inner(scope, asked.body), MODEL: asked.model}
                await self._answer(inside, asked.body, receive, meter)
        except Exception:  # not CancelledError: that client went away
            failed = True
            raise
        finally:
            self._waits.end(meter, time.monotonic())
            told = scope["method"] not in BODYLESS and not meter.cached and (failed or meter.ended)
            if self._vitals and told:
                failed = failed or meter.cut or (meter.status or 0) >= 500
                self._vitals.add(failed, meter.first_byte_s)
            if self._split and meter.ended and not meter.cached:
                self._split.copy(scope, asked, meter.status)
            if record:
                record.close()
            if self._cache and _may_change_models(scope):
                self._cache.clear()
            billed = not self._split or self._split.bills(meter.status)
            if key is not None and billed and scope["method"] not in BODYLESS:
                self._ledger.add(
                    key.id, _served(asked, meter), *meter.tokens(), cached=meter.cached
                )

    async def _answer(self, scope: Scope, body: bytes, receive: Receive, meter: Meter) -> None:
        limit_s = self._config.request_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                unread = scope["method"] in BODYLESS
                await self.app(scope, receive if unread else again(body, receive), meter.send)
        except TimeoutError:
            late = Refused(504, "timeout", f"no answer within {limit_s:g} s", kind="server_error")
            if meter.status is None:
                raise late from None
            if not meter.ended:  # half an answer must not look like a whole one
                meter.cut = True
                last = b"data: " + late.body() + b"\n\n"
                await meter.send({"type": "http.response.body", "body": last})


def _limits(key: Key, default: Limits) -> Limits:
    if default == _UNLIMITED:
        return key.limits
    own = key.limits.model_dump(exclude_none=True)
    return Limits(**{**default.model_dump(exclude_none=True), **own}) if own else default


def _check_model(key: Key, model: str | None, path: str) -> None:
    if key.for_all_models:
        return
    if model is None and path.startswith("/v1/models/"):
        model = path.removeprefix("/v1/models/")
    if model is None and path == "/v1/models":
        return
    if model is None:
        raise bad_request("a key for certain models needs `model` in the body", "model")
    if not key.may_use(model):
        raise not_allowed(f"this key is not for model `{model[:100]}`", "model")


def _served(asked: Question, meter: Meter) -> str:
    """The model, but by no name that a client makes up: those that were not served share one."""
    served = meter.status is not None and meter.status < 400
    return (asked.model or "") if served else ""


def _may_change_models(scope: Scope) -> bool:
    """Loading an adapter, new weights: every call that does not ask a model, for it may be one."""
    return scope["method"] not in BODYLESS and path_of(scope) not in USER_ROUTES
