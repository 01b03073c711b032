"""What applications of one's own share with vLLM's: OpenAI's errors, arguments, and the guard."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from manta import storage
from manta.errors import InputError
from manta.serving.guard.ingress import guarded_class
from manta.serving.openai_errors import Refused, bad_request
from manta.spec import Spec
from manta.spec.guard import GuardConfig

Args = TypeVar("Args", bound=Spec)


def openai_api(title: str) -> FastAPI:
    """A FastAPI application whose errors are those of OpenAI's API."""
    api = FastAPI(title=title)
    api.add_exception_handler(Refused, _refused)
    api.add_exception_handler(RequestValidationError, _invalid)
    return api


def guarded(api: FastAPI | Callable[[], Any], config: GuardConfig) -> Callable[[type], Any]:
    """In place of Ray's `serve.ingress(api)`: the same, with the guard in front of every route.

    `api` may be a function that makes an ASGI application; each replica calls it once.

    Call it where the application is built: the keys are looked up in the storage of that process.
    """
    from ray import serve

    root = storage.root()
    return lambda base: serve.ingress(api)(guarded_class(base, config, root))


def arguments(kind: type[Args], value: Any, page: str) -> Args:
    """An application's `args` as the model `kind`.

    Raises:
        InputError: one line, for the first thing that is wrong; `page` is where to look.
    """
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"{where or 'args'}: {first['msg']}", f"see {page}") from None


def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return Response(error.body(), status_code=error.status, media_type="application/json")


def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    names = [str(part) for part in first["loc"] if part != "body"]
    param = names[0] if names else None
    return _refused(request, bad_request(f"{'.'.join(names) or 'body'}: {first['msg']}", param))
