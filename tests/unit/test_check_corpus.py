"""Every fault planted in the corpus is found, at its line, and nothing else is called an error."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from manta import check

CORPUS = Path(__file__).parent / "corpus"
FILES = sorted(CORPUS.glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_planted_fault_is_found_at_its_line(path: Path) -> None:
    first, second = path.read_text().split("\n")[:2]
    expected = re.fullmatch(r"# expect: (?P<rule>[\w-]+) line (?P<line>\d+)", first)
    assert expected, "the first line says what to expect"
    companion = re.fullmatch(r"# with: (?P<name>\S+)", second)
    companions = [CORPUS / companion["name"]] if companion else []

    findings = [f for f in check.files([*companions, path]) if f.file == str(path)]

    assert (expected["rule"], int(expected["line"])) in {(f.rule, f.line) for f in findings}
    others = [f for f in findings if f.severity == "error" and f.rule != expected["rule"]]
    assert not others
    assert all(f.what for f in findings)


def test_the_corpus_is_large_and_plants_nearly_every_rule() -> None:
    planted = {path.read_text().split()[2] for path in FILES}
    assert len(FILES) >= 60
    elsewhere = {"unreadable", "working-dir-too-large", "serve-builder", "kubernetes-not-checked"}
    assert set(check.RULES) - planted == elsewhere


def test_companions_have_no_errors() -> None:
    for path in CORPUS.glob("companions/*.yaml"):
        assert not [f for f in check.files([path]) if f.severity == "error"]
