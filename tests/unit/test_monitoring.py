"""The files in configs/monitoring: they ask only for what is told, and in the language's words."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from exported_metrics import all_of_them, ours

from manta.serving.forwarding import gateway_metrics
from manta.serving.telemetry import metrics

FOLDER = Path(__file__).parents[2] / "configs" / "monitoring"
FUNCTIONS = {"sum", "max", "avg", "rate", "histogram_quantile", "absent"}
WORDS = {"by", "on", "and", "or", "unless"}


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    shown = json.loads((FOLDER / "dashboard.json").read_text())["panels"]
    return [panel for panel in shown if panel["type"] != "row"]


def expressions() -> list[str]:
    drawn = [target["expr"] for panel in panels() for target in panel["targets"]]
    return drawn + [rule["expr"] for rule in rules()]


def bare(expression: str) -> str:
    """Without label matchers, windows and lists of labels: functions, operators, metrics."""
    expression = re.sub(r'"[^"]*"', '""', expression)
    expression = re.sub(r"\{[^}]*\}|\[[^\]]*\]", "", expression)
    return re.sub(r"\b(by|on)\s*\([^)]*\)", "", expression)


def asked_for(expression: str) -> set[str]:
    words = re.findall(r"\b[a-zA-Z_]\w*\b(?!\s*\()", bare(expression))
    return set(words) - WORDS


def matched(expression: str) -> list[tuple[str, set[str]]]:
    """Metrics with the labels that the expression matches them by."""
    return [
        (name, set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", inside)))
        for name, inside in re.findall(r"(\w+)\{([^}]*)\}", expression)
    ]


@pytest.mark.parametrize("expression", expressions())
def test_every_metric_that_is_asked_for_is_one_that_is_told(expression: str) -> None:
    names = asked_for(expression)
    assert names
    assert names <= all_of_them()


def test_every_metric_of_the_guard_is_shown_or_alerted_on_but_sums_and_counts() -> None:
    asked = {name for expression in expressions() for name in asked_for(expression)}
    unused = {name for name in ours() - asked if not name.endswith(("_sum_total", "_count_total"))}
    assert unused == set()


@pytest.mark.parametrize("expression", expressions())
def test_labels_that_are_matched_are_labels_that_the_guard_tells(expression: str) -> None:
    told = (*metrics.ALL, *gateway_metrics.ALL)
    has = {one.exported: {"application", "deployment", "replica", *one.labels} for one in told}
    for name, labels in matched(expression):
        if name in has:
            assert labels <= has[name]


@pytest.mark.parametrize("expression", expressions())
def test_expressions_are_whole_and_use_known_functions(expression: str) -> None:
    stripped = re.sub(r'"[^"]*"', "", expression)
    for left, right in ("()", "[]", "{}"):
        assert stripped.count(left) == stripped.count(right)
    depth = 0
    for letter in stripped:
        depth += {"(": 1, ")": -1}.get(letter, 0)
        assert depth >= 0
    called = set(re.findall(r"\b([a-zA-Z_]\w*)\s*\(", bare(expression)))
    assert called <= FUNCTIONS | WORDS
    # A counter without `rate` is an ever growing line; a quantile needs its bounds.
    for counter in re.findall(r"\b\w+_total\b", expression):
        assert re.search(rf"rate\({counter}(\{{[^}}]*\}})?\[", expression)
    if "histogram_quantile" in expression:
        assert re.search(r"sum by \([^)]*\ble\b", expression)


def test_every_outcome_in_a_matcher_is_one_that_the_guard_tells() -> None:
    from manta.serving.telemetry import observer

    known = {*observer.OUTCOMES.values(), observer.OK, observer.ENGINE_ERROR, observer.BAD_REQUEST}
    for expression in expressions():
        for values in re.findall(r'outcome=~?"([^"]*)"', expression):
            assert set(values.split("|")) <= known


def test_every_rule_says_how_bad_it_is_and_what_to_do() -> None:
    assert len({rule["alert"] for rule in rules()}) == len(rules())
    for rule in rules():
        assert rule["labels"]["severity"] in ("page", "ticket", "info")
        assert rule["annotations"]["summary"]
        assert rule["annotations"]["what_to_do"]
        # A label in a message must be one that the expression leaves.
        for label in re.findall(r"\$labels\.(\w+)", json.dumps(rule["annotations"])):
            assert label in rule["expr"]


def test_the_dashboard_is_what_its_description_makes() -> None:
    spec = importlib.util.spec_from_file_location("monitoring", FOLDER / "dashboard.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules["monitoring"] = made
    spec.loader.exec_module(made)
    assert json.loads((FOLDER / "dashboard.json").read_text()) == made.dashboard()


def test_panels_do_not_cover_each_other() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in panels():
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not taken & cells
        taken |= cells


def test_prometheus_finds_every_node_through_the_dashboard_and_shows_it_the_token() -> None:
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    jobs = {job["job_name"]: job for job in config["scrape_configs"]}
    (found,) = jobs["ray"]["http_sd_configs"]
    assert found["url"].endswith("/api/prometheus/sd")
    assert found["authorization"] == {"type": "Bearer", "credentials_file": "cluster_token"}
    assert jobs["manta-queue"]["authorization"]["credentials_file"] == "queue_key"
    ignored = (FOLDER.parents[1] / ".gitignore").read_text().splitlines()
    for secret in ("cluster_token", "queue_key"):
        assert f"configs/monitoring/{secret}" in ignored
    assert all((FOLDER / name).exists() for name in config["rule_files"])
