"""Takes out of text what must not be kept: by pattern, so it finds what looks like it, no more."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

# Every repetition is bounded, or begins where no other can: whoever writes prompts must not be
# able to make a pattern take quadratic time.
_KEYS = (
    r"(?<![\w-])(?:manta_[0-9a-f]{12}_[\w-]{43}|[srp]k[-_][\w-]{16,}|gh[a-z]_\w{20,}"
    r"|github_pat_\w{20,}|hf_\w{20,}|glpat-[\w-]{16,}|xox[a-z]-[\w-]{10,}"
    r"|(?:AKIA|ASIA)[A-Z0-9]{16}\b|AIza[\w-]{30,}|eyJ[\w-]{8,}\.[\w-]{8,}(?:\.[\w-]*)?)",
    r"-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----.*?(?:-----END [A-Z ]{0,40}PRIVATE KEY-----|\Z)",
    r"(?i:\bbearer\s{1,5})[\w.~+/=-]{16,}",
    r"(?i:\b(?:api[_-]?key|token|secret|passw(?:or)?d)\b[\"']?\s{0,5}[:=]\s{0,5}[\"']?)"
    r"[^\s\"',;]{6,}",
)
_LOCAL = r"[\w.!#$%&'*+/=?^`{|}~-]"
_NAMED = {
    "email": rf"(?<!{_LOCAL}){_LOCAL}++@" r"(?:[\w-]{1,63}\.){1,8}[\w-]{2,63}",
    "key": "|".join(_KEYS),
    "card": r"(?<![\w-])\d(?:[ -]?\d){12,18}(?![\w-])",
    "phone": r"(?<![\w.+-])(?:\+|00)?(?:\(\d{1,5}\)|\d)(?:[ ./-]{0,2}(?:\(\d{1,5}\)|\d)){6,15}"
    r"(?![\w-])",
}
NAMES = tuple(_NAMED)
"""What can be taken out by name, in the order in which it is."""
MAX_DEPTH = 100


class Redactor:
    """Replaces what matches by `[NAME]`."""

    def __init__(self, names: Iterable[str], patterns: Iterable[str]) -> None:
        wanted = set(names)
        rules = [(name, _NAMED[name]) for name in NAMES if name in wanted]
        rules += [("redacted", pattern) for pattern in patterns]
        self._rules: list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
            (re.compile(pattern, re.DOTALL), _card if name == "card" else f"[{name}]")
            for name, pattern in rules
        ]

    def text(self, text: str) -> str:
        """The text without what matches."""
        for pattern, instead in self._rules:
            text = pattern.sub(instead, text)
        return text

    def value(self, value: Any, depth: int = 0) -> Any:
        """A JSON value: every string in it, names too, and numbers that read as one."""
        if depth > MAX_DEPTH:
            return "[nested too deep]"
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, list):
            if value and all(type(item) is int for item in value):
                return f"[{len(value)} token ids]"  # read by whoever has the tokenizer
            return [self.value(item, depth + 1) for item in value]
        if isinstance(value, dict):
            return {self.text(k): self.value(v, depth + 1) for k, v in value.items()}
        if isinstance(value, int | float) and not isinstance(value, bool):
            text = str(value)
            return value if self.text(text) == text else self.text(text)
        return value


def _card(match: re.Match[str]) -> str:
    digits = [int(digit) for digit in match[0] if digit.isdigit()]
    doubled = [d if i % 2 == 0 else d * 2 - 9 * (d > 4) for i, d in enumerate(digits[::-1])]
    return "[card]" if sum(doubled) % 10 == 0 else match[0]
