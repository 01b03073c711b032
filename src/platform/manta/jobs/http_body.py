"""What every body of the HTTP API must be, beside its own fields."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

MAX_DEPTH = 50
"""Of lists and objects in each other."""


class Body(BaseModel):
    """A body whose texts a database can keep: JSON can say more than UTF-8, or PostgreSQL."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _can_be_kept(cls, given: Any) -> Any:
        left = [(given, 0)]
        while left:  # no recursion: how deep it is, is up to whoever sent it
            value, depth = left.pop()
            if depth > MAX_DEPTH:
                raise ValueError(f"more than {MAX_DEPTH} lists and objects in each other")
            if isinstance(value, str):
                _require_text(value)
            elif isinstance(value, dict):
                left += [(part, depth + 1) for pair in value.items() for part in pair]
            elif isinstance(value, list):
                left += [(part, depth + 1) for part in value]
        return given


def _require_text(value: str) -> None:
    if "\0" in value:
        raise ValueError("a text contains U+0000")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("a text contains half a character (a lone surrogate)") from None
