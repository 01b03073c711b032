"""Faults of a request that vLLM takes for its own: 400 in place of 500.

vLLM knows by its own exceptions what a client did wrong. What its parsers, renderers and message
encoders do not expect comes out as AttributeError, KeyError, OverflowError …, and is answered
500. While nothing of a request has gone to the engine, such an exception follows from what was
sent. Once something has, it may be the engine's and stays 5xx; so do the death of an engine, a
full memory, time-outs and whatever the operating system says, at any time.

One failure of a running request is the client's as well: a grammar that cannot be compiled, or
that the other parameters leave no token for. vLLM ends only that request, as an error without a
reason; a request without a constraint, or an engine that gets its memory from another one
(a KV connector), can end so for other reasons, and keeps its 500.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from manta.serving.openai_errors import Refused, bad_request

OF_A_REQUEST = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What reading, checking and encoding raise. Not OSError, MemoryError, RuntimeError: those tell
of the machine as well."""
NO_ANSWER = "no answer keeps within `response_format`, `structured_outputs` or `tools` as given"
MAX_TEXT = 300

logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """How far one request has come."""

    is_handed_over: bool = False
    """Whether the engine has something of it."""
    is_constrained: bool = False
    """Whether its answer must follow a grammar."""
    is_refused: bool = False
    """Whether it was answered here."""


_progress: ContextVar[Progress | None] = ContextVar("progress", default=None)


def begin() -> Progress:
    """Note from here on how far this task's request comes."""
    progress = Progress()
    _progress.set(progress)
    return progress


def watch(app: Any, engine_client: Any) -> None:
    """Have `app`, vLLM's FastAPI application, answer what is the request's fault with 400.

    Call it before `app` has answered anything.
    """
    core = engine_client.engine_core
    core.add_request_async = _noting(core.add_request_async)
    has_connector = engine_client.vllm_config.kv_transfer_config is not None

    def refusal(error: Exception) -> Refused | None:
        progress = _progress.get()
        if progress is None or engine_client.errored:
            return None
        return _refusal(error, progress, has_connector)

    for kind, handler in list(app.exception_handlers.items()):
        if isinstance(kind, type) and issubclass(kind, Exception):
            app.exception_handlers[kind] = _asking(refusal, handler)
    app.middleware_stack = None  # built with the handlers of before; made anew when first asked


def _noting(send: Callable[[Any], Awaitable[None]]) -> Callable[[Any], Awaitable[None]]:
    async def add_request_async(request: Any) -> None:
        await send(request)  # encodes first: what cannot be encoded never left
        if progress := _progress.get():
            sampling = request.sampling_params
            progress.is_handed_over = True
            progress.is_constrained = bool(sampling and sampling.structured_outputs)

    return add_request_async


def _asking(
    refusal: Callable[[Exception], Refused | None], theirs: Callable[..., Any]
) -> Callable[..., Any]:
    async def handle(request: Any, error: Exception) -> Any:
        from starlette.responses import Response

        refused = refusal(error)
        if refused is None:
            return await theirs(request, error)
        progress = _progress.get()
        assert progress is not None
        progress.is_refused = True
        return Response(refused.body(), refused.status, media_type="application/json")

    return handle


def _refusal(error: Exception, progress: Progress, has_connector: bool) -> Refused | None:
    """What to answer in place of vLLM's 5xx; None where vLLM's own answer is right."""
    from msgspec import MsgspecError
    from vllm.exceptions import GenerationError, VLLMError
    from vllm.v1.engine.exceptions import EngineGenerateError

    if isinstance(error, GenerationError):
        is_theirs = progress.is_constrained and not has_connector
        return bad_request(NO_ANSWER, code="constraint_failed") if is_theirs else None
    if progress.is_handed_over:
        return None
    # vLLM's wrapping for whatever went wrong on the way to the engine and back.
    cause = error.__cause__ if isinstance(error, EngineGenerateError) else error
    if isinstance(cause, VLLMError) or not isinstance(cause, (*OF_A_REQUEST, MsgspecError)):
        return None
    if isinstance(cause, NotImplementedError):
        return bad_request(f"not supported: {_text(cause)}", code="not_supported")
    if cause is error and isinstance(cause, ValueError | TypeError | OverflowError):
        return None  # vLLM itself answers these with 400
    where = traceback.extract_tb(cause.__traceback__)[-1]
    name = type(cause).__name__
    # Never the text, which may repeat what the client sent.
    logger.warning("unexpected in a request: %s, %s:%s", name, where.filename, where.lineno)
    what = f"the engine cannot read a part of the request ({name}: {_text(cause)})"
    return bad_request(what)


def _text(error: BaseException) -> str:
    from vllm.entrypoints.serve.exception_handling.utils import sanitize_message

    return str(sanitize_message(str(error)))[:MAX_TEXT] or "no reason given"
