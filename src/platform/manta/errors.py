"""The few exceptions that users see: one line for each finding, and an exit code."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning", "info"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is wrong with what a user wrote, and what to write instead."""

    file: str
    what: str
    line: int | None = None
    fix: str = ""
    rule: str = "spec"
    severity: Severity = "error"

    def __str__(self) -> str:
        where = self.file if self.line is None else f"{self.file}:{self.line}"
        fix = f"; {self.fix}" if self.fix else ""
        return f"{where}: {self.what}{fix}"


class MantaError(Exception):
    """The work failed, for a reason that the message states. Exit code 1.

    Args:
        what: what went wrong, one line.
        fix: what to do about it, one line; may be empty.
    """

    exit_code = 1

    def __init__(self, what: str, fix: str = "") -> None:
        self.what, self.fix = what, fix
        super().__init__(f"{what}; {fix}" if fix else what)


class InputError(MantaError):
    """What the user gave cannot be used: bad usage, bad input. Exit code 2."""

    exit_code = 2


class InvalidSpec(InputError):
    """A file that the user wrote has findings; the message is one line each."""

    def __init__(self, findings: Iterable[Finding]) -> None:
        self.findings = tuple(findings)
        super().__init__("\n".join(map(str, self.findings)))
