"""Several models behind one address: each request goes to who answers for its model.

Used as `import_path: manta.serving.gateway:build_gateway_app` in a native Serve config; the
arguments are `manta.spec.gateway`. It has no engine: an ASGI application with the guard in front,
so that keys, limits and use are those of the gateway, whoever answers behind it. A target that is
down costs no request: as long as the client has seen nothing, the next is asked.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from typing import TYPE_CHECKING, Any

from manta.serving.access.keys import USER_ROUTES
from manta.serving.forwarding import gateway_metrics, targets
from manta.serving.forwarding.forward import CutShort, Forwarder, Head, NotForwarded, Why
from manta.serving.forwarding.gateway_metrics import Outcome
from manta.serving.forwarding.relay import Relay
from manta.serving.forwarding.targets import LOOK_S, Applications, Served, Upstream
from manta.serving.guard.background import Background
from manta.serving.openai_app import arguments, guarded
from manta.serving.openai_errors import Refused, Send
from manta.serving.request import asked_model
from manta.serving.request.asked_model import Asked
from manta.serving.request.exchange import SIGHT, Receive, Scope, header_of, path_of, read_body
from manta.serving.telemetry.metrics import News, Ray, Sink
from manta.spec.gateway import GatewayArgs, Target

if TYPE_CHECKING:
    from ray.serve import Application

HOPS = b"x-manta-gateways"
"""Gateways that a request has passed."""
MAX_HOPS = 3
TELL_S = 5.0
RETRY_S = 1.0
"""For a client, where nothing says how long to wait."""
MAX_RETRY_S = 60.0

_PASSED_ON = frozenset(
    {
        *(b"accept", b"cache-control", b"content-type", b"traceparent", b"tracestate"),
        *(b"x-request-id", b"openai-beta", b"serve_multiplexed_model_id"),
    }
)
"""Of a client's headers; the others are nobody's business, least of all outside."""
_COUNT_AS_FAILURES = frozenset(
    {Outcome.UNREACHABLE, Outcome.SILENT, Outcome.BROKEN, Outcome.DOWN, Outcome.CLOSED}
)

logger = logging.getLogger(__name__)


class Gateway:
    """The ASGI application."""

    def __init__(
        self,
        config: GatewayArgs,
        applications: Applications | None = None,
        sink: Sink | None = None,
    ) -> None:
        """
        Args:
            config: models and targets.
            applications: where those of this cluster answer; None if no target is one.
            sink: where metrics go; None: nowhere.

        Raises:
            InputError: a key or a cluster that is named is not there.
        """
        self._config = config
        self._models = {
            name: targets.served(name, model, config.breaker)
            for name, model in config.models.items()
        }
        self._applications = {"": applications} if applications else {}
        for target in _targets(config):
            if target.cluster:
                self._applications[target.cluster] = targets.elsewhere(target.cluster)
        self._forwarder = Forwarder(config.connect_timeout_s)
        self._sink = sink
        self._news = News()
        self._background = Background()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, as ASGI has it."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        try:
            await self._start()
            await self._answer(scope, receive, send)
        except Refused as refusal:
            await refusal.send(send)

    # --- life ----------------------------------------------------------------------------

    async def _live(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                await self._start()
            else:
                await self.stop()
            await send({"type": f"{message['type']}.complete"})
            if message["type"] == "lifespan.shutdown":
                return

    async def _start(self) -> None:
        """Begin the background work, once, and wait until it is known who answers where."""
        await self._background.begin(self._look_once, lambda: (self._look(), self._tell()))

    async def stop(self) -> None:
        """End the background work and all connections."""
        self._background.end()
        await self._forwarder.close()

    async def _look_once(self) -> None:
        await asyncio.gather(*(each.look() for each in self._applications.values()))

    async def _look(self) -> None:
        while self._applications:
            await asyncio.sleep(LOOK_S)
            await self._look_once()

    async def _tell(self) -> None:
        while self._sink:
            await asyncio.sleep(TELL_S)
            news, self._news = self._news, News()
            for model in self._models.values():
                for one in model.all:
                    at = gateway_metrics.LEFT_OUT, (model.name, one.label)
                    news.levels[at] = float(one.breaker.is_open())
            try:
                await asyncio.to_thread(news.tell, self._sink)
            except Exception as error:  # whatever Ray raises: serving must go on
                logger.warning("metrics cannot be told: %r", error)

    # --- one request ---------------------------------------------------------------------

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, method = path_of(scope), scope["method"]
        if method in ("GET", "HEAD") and path in ("/health", "/ping"):
            await _send_json(send, {})
        elif method in ("GET", "HEAD") and path == "/v1/models":
            listed = [_described(name) for name in self._models if _may_use(scope, name)]
            await _send_json(send, {"object": "list", "data": listed})
        elif method in ("GET", "HEAD") and path.startswith("/v1/models/"):
            await _send_json(send, _described(self._model(path.removeprefix("/v1/models/")).name))
        elif method == "POST" and path in USER_ROUTES:
            most = self._config.guard.max_body_bytes
            asked = asked_model.read(scope, await read_body(receive, most))
            await self._ask(asked, path, scope, receive, send)
        else:
            raise Refused(404, "not_found", "the gateway has no such route")

    def _model(self, name: str | None) -> Served:
        if name is None:  # not even with one model: prices and limits go by the name
            raise Refused(400, "invalid_value", "say which `model`", param="model")
        if name not in self._models:
            what = f"the model `{name[:100]}` does not exist; GET /v1/models lists those that do"
            raise Refused(404, "model_not_found", what, param="model")
        return self._models[name]

    async def _ask(
        self, asked: Asked, path: str, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Ask one target after the other until one answers. Raises Refused if none does."""
        model = self._model(asked.model)
        told = _passed_on(scope)
        tried: list[tuple[Upstream, Outcome, float]] = []
        for upstream in model.in_order():
            if not upstream.breaker.may_try(time.monotonic()):
                pause_s = upstream.breaker.pause_s(time.monotonic())
                tried.append((upstream, Outcome.LEFT_OUT, pause_s))
                continue
            try:
                await self._try(model, upstream, asked, path, told, receive, send)
            except NotForwarded as failure:
                outcome = _outcome(failure)
                tried.append((upstream, outcome, _retry_after_s(failure.head)))
                self._failed(model, upstream, outcome)
            else:
                return
        raise _nobody(model, path, tried)

    async def _try(
        self,
        model: Served,
        upstream: Upstream,
        asked: Asked,
        path: str,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        """Raises NotForwarded if another target may be asked."""
        url = upstream.url(path, self._applications.get(upstream.target.cluster or ""))
        if url is None:
            raise NotForwarded(Why.UNREACHABLE if upstream.target.app else Why.STATUS)
        renamed = model.name if upstream.model != model.name else None
        relay = Relay(send, upstream.label, renamed, upstream.breaker.answered)
        body = asked.body_for(upstream.model, anew=upstream.target.url is not None)
        config = self._config
        upstream.breaker.begin()
        try:
            sent = await self._forwarder.forward(
                url,
                scope,
                body,
                receive,
                relay.send,
                headers=_authorization(upstream),
                first_byte_timeout_s=(
                    config.first_byte_timeout_s if asked.is_stream else config.answer_timeout_s
                ),
                try_elsewhere=self._try_elsewhere,
            )
        except NotForwarded:
            raise
        except CutShort as error:
            self._failed(model, upstream, Outcome.CUT)
            logger.warning("%s broke off in the middle of an answer: %s", upstream.label, error)
            await relay.broke(_CUT.body())
            raise
        except BaseException:  # the client, or Serve on its behalf
            self._count(model, upstream, Outcome.CLIENT_GONE)
            upstream.breaker.undecided()
            raise
        upstream.breaker.undecided()
        self._count(model, upstream, _ended(sent.status, whole=sent.whole))

    def _try_elsewhere(self, head: Head) -> bool:
        outcome = gateway_metrics.outcome_of(head)
        if outcome is Outcome.OVERLOADED:
            return self._config.fall_back_on_overload
        return outcome is not None

    def _failed(self, model: Served, upstream: Upstream, outcome: Outcome) -> None:
        self._count(model, upstream, outcome)
        if outcome is Outcome.CUT or outcome in _COUNT_AS_FAILURES:
            upstream.breaker.failed(time.monotonic())
        else:
            upstream.breaker.undecided()
        if outcome is Outcome.CLOSED:
            logger.warning("%s does not take the gateway's key", upstream.label)

    def _count(self, model: Served, upstream: Upstream, outcome: Outcome) -> None:
        self._news.count(gateway_metrics.REQUESTS, model.name, upstream.label, str(outcome))


def _outcome(failure: NotForwarded) -> Outcome:
    if failure.why is Why.STATUS:
        found = gateway_metrics.outcome_of(failure.head) if failure.head else None
        return found or Outcome.ABSENT
    return Outcome(failure.why.value)


def _ended(status: int | None, *, whole: bool) -> Outcome:
    if status is None or not whole:
        return Outcome.CLIENT_GONE
    return Outcome.REFUSED if status >= 400 else Outcome.OK


def _nobody(model: Served, path: str, tried: list[tuple[Upstream, Outcome, float]]) -> Refused:
    """What the client is told when no target answers."""
    outcomes = {outcome for _, outcome, _ in tried}
    if outcomes == {Outcome.ABSENT}:
        what = f"nothing that answers for the model `{model.name}` has the route {path}"
        return Refused(404, "not_found", what)
    reasons = ", ".join(
        f"{one.label} {str(outcome).replace('_', ' ')}" for one, outcome, _ in tried
    )
    waits = [wait_s for _, _, wait_s in tried if wait_s > 0]
    return Refused(
        503,
        "overloaded" if outcomes <= {Outcome.OVERLOADED, Outcome.ABSENT} else "no_target",
        f"nothing answers for the model `{model.name}` now: {reasons}",
        kind="server_error",
        retry_after_s=min([*waits, MAX_RETRY_S]) if waits else RETRY_S,
    )


_CUT = Refused(502, "cut_short", "the answer broke off; ask again", kind="server_error")


def _retry_after_s(head: Head | None) -> float:
    value = head.get(b"retry-after") if head else b""
    return float(value) if value.isdigit() else 0.0


def _authorization(upstream: Upstream) -> list[tuple[bytes, bytes]]:
    key = upstream.secret.value()
    return [(b"authorization", b"Bearer " + key.encode())] if key else []


def _passed_on(scope: Scope) -> Scope:
    """The request as targets see it. Raises Refused if it goes round in circles."""
    hops = header_of(scope, HOPS) or b"0"
    num_hops = int(hops) if hops.isdigit() and len(hops) < 4 else MAX_HOPS
    if num_hops >= MAX_HOPS:
        what = f"the request has passed {MAX_HOPS} gateways: do they point at each other?"
        raise Refused(508, "loop", what, kind="server_error")
    headers = [(name, value) for name, value in scope["headers"] if name.lower() in _PASSED_ON]
    ours = [(HOPS, str(num_hops + 1).encode()), (b"user-agent", b"manta-gateway")]
    return {**scope, "headers": [*headers, *ours], "query_string": b""}


def _may_use(scope: Scope, model: str) -> bool:
    sight = scope.get(SIGHT)
    return sight is None or sight.key is None or sight.key.may_use(model)


def _described(model: str) -> dict[str, Any]:
    return {"id": model, "object": "model", "created": 0, "owned_by": "manta"}


async def _send_json(send: Send, value: dict[str, Any]) -> None:
    body = json.dumps(value).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


# --- the application -------------------------------------------------------------------------


class _Entry:
    """What Ray makes in each replica; the ASGI application beside it answers."""


def build_gateway_app(args: dict[str, Any]) -> Application:
    """The application of `serve_apps/gateway.yaml`. Raises InputError for wrong arguments."""
    from ray import serve

    config = arguments(GatewayArgs, args, "docs/gateway.md")

    def make() -> Gateway:
        asks_here = any(one.app and not one.cluster for one in _targets(config))
        applications = Applications(_root_url) if asks_here else None
        return Gateway(config, applications, Ray(gateway_metrics.ALL))

    entry = guarded(make, config.guard)(_Entry)
    return serve.deployment(entry, name="Gateway", max_ongoing_requests=1024).bind()


def _targets(config: GatewayArgs) -> list[Target]:
    return [target for model in config.models.values() for target in model.targets]


def _root_url() -> str:
    """Where Serve's proxy answers on this node."""
    from ray.serve.context import _get_global_client

    options = _get_global_client().http_config
    everywhere = options.host in (None, "", "0.0.0.0", "::")
    scheme = "https" if options.ssl_certfile else "http"
    host = "127.0.0.1" if everywhere else options.host
    return f"{scheme}://{host}:{options.port}{options.root_path or ''}"
