"""What a request may have compiled into a grammar: schemas, regular expressions, tools.

The compiler (xgrammar) takes time by the cube of how deep a schema nests and by the square of how
many properties an object has, and holds Python's lock meanwhile: 900 arrays in each other, 27 kB,
stop a replica for all its users for minutes. The bounds below keep each within about a second.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from manta.serving.openai_errors import bad_request

MAX_DEPTH = 64
"""Objects and lists in each other, in the body and in JSON within its strings."""
MAX_MEMBERS = 300
"""Properties of one object; members of one list, but of one of strings."""
MAX_PATTERN_CHARS = 1_000
"""Of one regular expression: a character class of 4,000 takes the compiler over 4 s."""
MAX_GRAMMAR_CHARS = 20_000
"""Of one grammar or structural tag, and of all members of one list of choices."""
MAX_EXPONENT = 10
"""Of the number of tokens in a beam's score; at some hundreds it is zero or infinite."""

FIELDS = ("structured_outputs", "response_format", "tools", "functions", "text")
_PATTERNS = ("pattern", "regex", "whitespace_pattern")
_GRAMMARS = ("grammar", "structural_tag", "json")


def check(value: dict[str, Any]) -> None:
    """Raises Refused if the body holds something that takes the compiler too long."""
    _check_depth(value, "body")
    sampling = value.get("sampling_params")
    for holder in (value, sampling) if isinstance(sampling, dict) else (value,):
        for field in FIELDS:
            if field in holder:
                for name, inner in _members(holder[field]):
                    _check_member(field, name, inner)
    exponent = value.get("length_penalty")
    if isinstance(exponent, int | float) and abs(exponent) > MAX_EXPONENT:
        what = f"`length_penalty` is {exponent:g}; at most {MAX_EXPONENT} either way"
        raise bad_request(what, "length_penalty")


def _check_depth(value: Any, field: str) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return
    raise bad_request(f"`{field}` nests deeper than {MAX_DEPTH} levels", field)


def _inside(value: Any) -> list[Any]:
    inner = value.values() if isinstance(value, dict) else value
    return [one for one in inner if isinstance(one, (dict, list))]


def _members(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Whatever stands in it under a name, however deep; no deeper than was checked."""
    yield name, value
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _members(inner, key)
    elif isinstance(value, list):
        for inner in value:
            if isinstance(inner, dict | list):
                yield from _members(inner)


def _check_member(field: str, name: str, value: Any) -> None:
    if isinstance(value, str) and name in (*_PATTERNS, *_GRAMMARS):
        most = MAX_PATTERN_CHARS if name in _PATTERNS else MAX_GRAMMAR_CHARS
        if len(value) > most:
            raise _too_long(field, name, len(value), most)
        if name in _GRAMMARS:
            _check_text(field, value)
    elif isinstance(value, list) and all(isinstance(one, str) for one in value):
        if (num_chars := sum(map(len, value))) > MAX_GRAMMAR_CHARS:
            raise _too_long(field, name, num_chars, MAX_GRAMMAR_CHARS)
    elif isinstance(value, dict | list) and len(value) > MAX_MEMBERS:
        what = f"{len(value)} members of `{name or field}` in `{field}`; at most {MAX_MEMBERS}"
        raise bad_request(what, field)


def _check_text(field: str, text: str) -> None:
    """JSON that stands in a string is read by others later."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise bad_request(f"`{field}` nests deeper than {MAX_DEPTH} levels", field) from None
    except ValueError:
        return  # a grammar, or something that the engine refuses
    if isinstance(value, dict | list):
        _check_depth(value, field)
        for name, inner in _members(value):
            _check_member(field, name, inner)


def _too_long(field: str, name: str, num_chars: int, most: int) -> Exception:
    return bad_request(f"{num_chars} characters of `{name}` in `{field}`; at most {most}", field)
