"""The rules that hold while a file is read or its typed spec is made (`spec`, `check.work`)."""

from __future__ import annotations

from manta.check.rules import register_reading_rule as _rule

_rule("unreadable", "error", "A file that is not there, not text, or too large holds no spec.")
_rule("not-yaml", "error", "Ray would stop with a traceback; some such files exhaust its memory.")
_rule("duplicate-key", "error", "YAML readers silently take the last of two equal keys.")
_rule("unknown-kind", "error", "Nothing can be said about a file of an unknown kind.")
_rule("kubernetes-not-checked", "info", "Kubernetes knows its own schemas; so nobody is misled.")
_rule("unknown-key", "error", "Refused when used, or worse: silently without effect.")
_rule("missing-key", "error", "Refused when used.")
_rule("wrong-value", "error", "Of a type or in a range that Ray or the job refuses.")
_rule("missing-file", "error", "A job starts, waits for its node, and fails on the first line.")
_rule("step-name-twice", "error", "Steps are told apart, resumed and waited for by their names.")
_rule("unknown-need", "error", "A step that waits for nobody's step never starts.")
_rule("needs-cycle", "error", "Steps that wait for each other never start.")
