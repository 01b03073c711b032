"""Which model a request names, in JSON or in a form, and the same request with another name."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from manta.serving.openai_errors import bad_request
from manta.serving.request.exchange import Scope, header_of

_BOUNDARY = re.compile(rb'boundary(?:\*\d*)?\s*="?([^";,\s]{1,70})"?', re.IGNORECASE)
_NAME = re.compile(rb';\s*name(\*\d*\*?)?\s*="?([^";]*)"?', re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """A request's body, and what of it decides where it goes."""

    body: bytes
    model: str | None
    is_stream: bool = False
    _json: dict[str, Any] | None = None
    _span: tuple[int, int] | None = None
    """Of the model's name in a form."""

    def body_for(self, model: str, *, anew: bool) -> bytes:
        """The body that names `model`.

        With `anew` JSON is written anew in any case: of a name that stands in it twice, others may
        read the first, and only the last was looked at.
        """
        if self._json is not None and (anew or model != self.model):
            return json.dumps({**self._json, "model": model}).encode()
        if self._span is None or model == self.model:
            return self.body
        start, end = self._span
        return self.body[:start] + model.encode() + self.body[end:]


def read(scope: Scope, body: bytes) -> Asked:
    """Raises Refused if the body is neither a JSON object nor a form that names one model."""
    content_type = header_of(scope, b"content-type") or b"application/json"
    if content_type.lower().startswith(b"multipart/form-data"):
        return _form(body, content_type)
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise bad_request("the body is not a JSON object", code="invalid_json")
    model = value.get("model")
    if model is not None and not isinstance(model, str):
        raise bad_request("`model` is not a string", "model")
    return Asked(body=body, model=model, is_stream=value.get("stream") is True, _json=value)


def _form(body: bytes, content_type: bytes) -> Asked:
    """A form's parts are left as they are: sound is large. Source: RFC 7578."""
    found = _BOUNDARY.findall(content_type)
    if len(found) != 1:
        raise bad_request("the form does not have one boundary", code="invalid_form")
    mark = b"--" + found[0]
    spans = [span for span in _parts(body, mark) if _is_model(body[span[0] : span[1]])]
    if len(spans) > 1:
        raise bad_request("the form names more than one model", "model")
    if not spans:
        return Asked(body=body, model=None)
    start = spans[0][1] + 4
    end = body.find(b"\r\n" + mark, start)
    try:
        model = body[start:end].decode()
    except UnicodeDecodeError:
        raise bad_request("`model` is not text", "model") from None
    return Asked(body=body, model=model, _span=(start, end))


def _parts(body: bytes, mark: bytes) -> list[tuple[int, int]]:
    """Where each part's headers lie; the content follows four bytes after their end."""
    spans, at = [], 0 if body.startswith(mark) else body.find(b"\r\n" + mark)
    while at >= 0:
        begin = body.find(mark, at) + len(mark)
        if body[begin : begin + 2] != b"\r\n":  # the last, or a name that begins like the mark
            break
        end = body.find(b"\r\n\r\n", begin)
        following = body.find(b"\r\n" + mark, begin)
        if end < 0 or following < end:
            raise bad_request("the form is cut short", code="invalid_form")
        spans.append((begin, end))
        at = following
    return spans


def _is_model(headers: bytes) -> bool:
    """Refuses what others may read otherwise: a part with two names, or one in RFC 2231's way."""
    lines = [line.partition(b":") for line in headers.split(b"\r\n")]
    said = [value for name, _, value in lines if name.strip().lower() == b"content-disposition"]
    names = [found for value in said for found in _NAME.findall(value)]
    if len(said) > 1 or len(names) > 1 or any(extended for extended, _ in names):
        raise bad_request("a part of the form has no plain name", code="invalid_form")
    return bool(names and names[0][1].strip() == b"model")
