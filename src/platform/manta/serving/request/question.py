"""What a request asks for, read from its JSON body, and whether it is within the bounds."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from manta.serving.openai_errors import bad_request
from manta.serving.request import asked_model, constraints, media
from manta.serving.request.exchange import Scope
from manta.spec.guard import GuardConfig

STREAMS = frozenset({"/v1/completions", "/v1/chat/completions"})
"""Routes whose streams tell their use if asked to (`stream_options`)."""
DEFAULT_COMPLETION_TOKENS = 16
"""What vLLM generates for a completion that does not say how much."""
DEFAULT_CHAT_TOKENS = 256
"""What is reserved for a chat that does not say; it may use the whole context."""
CHARS_PER_TOKEN = 3
"""For reservations only. English has 4, code and small vocabularies fewer."""

UNSAMPLED = frozenset(
    {
        *("/v1/embeddings", "/v1/score", "/score", "/v1/rerank", "/v2/rerank", "/rerank"),
        *("/pooling", "/classify"),
    }
)
"""Routes whose answers follow from the request alone."""

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]|\xed[\xa0-\xbf]|\0")
"""Where half a character may be: escaped, as UTF-8 cannot have it, or in another encoding."""
_MANY = ("prompt", "input", "documents", "queries", "text_1", "text_2")
_ONE = ("query", "suffix")


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """The request body, and what follows from it."""

    body: bytes
    """What goes to the application: as sent, or with `stream_options` added."""
    model: str | None = None
    num_prompt_tokens: int = 0
    """An estimate, exact where the prompt is token ids."""
    max_completion_tokens: int = 0
    """What is reserved for the answer."""
    hide_usage: bool = False
    """Whether a stream tells its use to us only."""
    repeatable: bool = False
    """Whether the same request must have the same answer."""
    sent: bytes | None = None
    """The body as the client sent it, if it is another."""
    is_sound: bool = False
    """Whether it is a form with a sound, whose answer may not say what it took."""
    is_copy: bool = False
    """Whether the running version has answered it already: it counts for nobody."""


def read(body: bytes, path: str, bounds: GuardConfig) -> Question:
    """Read a JSON request body.

    Raises:
        Refused: it is not a JSON object, or over one of the bounds.
    """
    value = _parse(body)
    if not isinstance(value, dict):
        raise bad_request("the body is not a JSON object", code="invalid_json")
    model = value.get("model")
    if model is not None and not isinstance(model, str):
        raise bad_request("`model` is not a string", "model")
    constraints.check(value)
    num_media = media.count(value)
    if num_media > bounds.max_media:
        most = bounds.max_media
        raise bad_request(f"{num_media} pictures and sounds; at most {most}", "messages")
    num_prompts, num_chars, num_ids = _size(value)
    if num_prompts > bounds.max_prompts:
        most = bounds.max_prompts
        raise bad_request(f"{num_prompts} inputs; at most {most} in one request", "prompt")
    if num_chars > bounds.max_prompt_chars:
        most = bounds.max_prompt_chars
        what = f"{num_chars} characters of prompt; at most {most}"
        raise bad_request(what, "prompt", "context_length_exceeded")
    choices = _choices(value, bounds.max_choices)
    hide_usage = path in STREAMS and _tell_use(value)
    return Question(
        body=json.dumps(value).encode() if hide_usage else body,
        model=model,
        num_prompt_tokens=num_chars // CHARS_PER_TOKEN
        + num_ids
        + num_prompts
        + num_media * bounds.media_tokens,
        max_completion_tokens=_most_tokens(value, path) * choices * num_prompts,
        hide_usage=hide_usage,
        sent=body if hide_usage else None,
        repeatable=choices == 1 and _repeatable(value, path),
    )


def read_form(scope: Scope, body: bytes, bounds: GuardConfig) -> Question:
    """A form with a sound, as it was sent.

    Raises:
        Refused: it cannot be told which model it names.
    """
    asked = asked_model.read(scope, body)
    return Question(
        body=body, model=asked.model, num_prompt_tokens=bounds.media_tokens, is_sound=True
    )


def _parse(body: bytes) -> Any:
    """JSON as its standard has it. Python's own reader takes more, which servers behind this one
    cannot put into an answer or a tokenizer and would fail on.
    """
    try:
        value = json.loads(body, parse_constant=_number, parse_float=_number)
        if _SURROGATE.search(body):  # half a character, unless the other half follows
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        raise bad_request("the body is not valid JSON", code="invalid_json") from None
    return value


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("no number of JSON's")
    return number


def _tell_use(value: dict[str, Any]) -> bool:
    """Have a stream end with its use. Returns whether the client did not ask for that itself."""
    options = value.get("stream_options")
    if value.get("stream") is not True or not isinstance(options, dict | None):
        return False
    if options and options.get("include_usage") is True:
        return False
    value["stream_options"] = {**(options or {}), "include_usage": True}
    return True


def _repeatable(value: dict[str, Any], path: str) -> bool:
    """Greedy decoding, a seed of the client's own, or nothing to draw. The default temperature is
    not 0, and differs between models.
    """
    if path not in STREAMS and path not in UNSAMPLED:
        return False
    if not _only_text(value.get("messages")) or "kv_transfer_params" in value:
        return False  # a picture behind an address can change; the other moves an engine's memory
    temperature, seed = value.get("temperature"), value.get("seed")
    greedy = temperature == 0 and not isinstance(temperature, bool)
    seeded = isinstance(seed, int) and not isinstance(seed, bool)
    return path in UNSAMPLED or greedy or seeded


def _only_text(messages: Any) -> bool:
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else ():
            if not isinstance(part, dict) or part.get("type") != "text":
                return False
    return True


def _choices(value: dict[str, Any], most: int) -> int:
    largest = 1
    for name in ("n", "best_of"):
        number = value.get(name)
        if number is None:
            continue
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise bad_request(f"`{name}` is not a whole number of 1 or more", name)
        if number > most:
            raise bad_request(f"`{name}` is {number}; at most {most}", name)
        largest = max(largest, number)
    return largest


def _most_tokens(value: dict[str, Any], path: str) -> int:
    if path not in STREAMS:
        return 0
    for name in ("max_completion_tokens", "max_tokens"):
        number = value.get(name)
        if number is None:
            continue
        if not isinstance(number, int) or isinstance(number, bool) or number < 0:
            raise bad_request(f"`{name}` is not a whole number of 0 or more", name)
        return number
    return DEFAULT_CHAT_TOKENS if "messages" in value else DEFAULT_COMPLETION_TOKENS


def _size(value: dict[str, Any]) -> tuple[int, int, int]:
    """Inputs, characters and token ids of all the fields that can hold prompts."""
    num_prompts = num_chars = num_ids = 0
    for name in _MANY:
        prompts, chars, ids = _inputs(value.get(name))
        num_prompts, num_chars, num_ids = (
            max(num_prompts, prompts),
            num_chars + chars,
            num_ids + ids,
        )
    num_chars += sum(len(value[name]) for name in _ONE if isinstance(value.get(name), str))
    num_chars += sum(map(len, _texts(value.get("messages"))))
    return max(1, num_prompts), num_chars, num_ids


def _inputs(value: Any) -> tuple[int, int, int]:
    if isinstance(value, str):
        return 1, len(value), 0
    if not isinstance(value, list) or not value:
        return 0, 0, 0
    if all(isinstance(item, int) for item in value):
        return 1, 0, len(value)
    chars = sum(len(item) for item in value if isinstance(item, str))
    ids = sum(len(item) for item in value if isinstance(item, list))
    return len(value), chars, ids


def _texts(messages: Any) -> Iterator[str]:
    """Text of a chat; pictures and sounds are counted in `media`."""
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, str):
            yield content
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict) and isinstance(part.get("text"), str):
                yield part["text"]
