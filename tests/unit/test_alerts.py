"""The alert rules, by Prometheus' own `promtool`: each is quiet when all is well, and fires."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

FOLDER = Path(__file__).parents[2] / "configs" / "monitoring"
pytestmark = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="no promtool (Debian's package prometheus)"
)

TTFT = "ray_manta_time_to_first_token_seconds_bucket_total"
REQUESTS = "ray_manta_requests_total"
HEALTHY = "ray_serve_deployment_replica_healthy"
STATUS = "ray_serve_deployment_status"
LEFT_OUT = "ray_manta_gateway_target_left_out"
KV_CACHE = "ray_vllm_kv_cache_usage_perc"
WAITING = "ray_vllm_num_requests_waiting"
LLM = 'application="llm"'
MODEL = f'{LLM},model="tiny"'
SPARE = 'application="gateway",model="tiny",target="spare"'


@dataclass(frozen=True)
class Trouble:
    """What Prometheus reads every 10 s: all well for half an hour, then trouble for as long.

    The series are in promtool's own notation, `start+step x times`, or a value's repetition.
    """

    alert: str
    series: dict[str, str]
    fires: dict[str, str]
    """The labels of the alert, but for its name, state and severity."""


HALF_AN_HOUR = 180
"""Readings."""


def level(well: float, ill: float) -> str:
    return f"{well}x{HALF_AN_HOUR} {ill}x{HALF_AN_HOUR}"


def counter(well: int, ill: int) -> str:
    """One that grows by so much between two readings."""
    return f"0+{well}x{HALF_AN_HOUR} {well * HALF_AN_HOUR}+{ill}x{HALF_AN_HOUR}"


def outcomes(ill: str, **labels: str) -> dict[str, str]:
    """Ten requests a reading end well; in trouble four end ill beside six."""
    where = ",".join([LLM, *(f'{name}="{value}"' for name, value in labels.items())])
    return {
        f'{REQUESTS}{{{where},outcome="ok"}}': counter(10, 6),
        f'{REQUESTS}{{{where},outcome="{ill}"}}': counter(0, 4),
    }


APP = {"application": "llm"}
TROUBLES = [
    Trouble(
        "NoHealthyReplica",
        {
            f'{HEALTHY}{{{LLM},deployment="d",replica="a"}}': level(1, 0),
            f'{HEALTHY}{{{LLM},deployment="d",replica="b"}}': level(0, 0),
            f'{STATUS}{{{LLM},deployment="d"}}': level(6, 2),
            # At zero on purpose, all the time.
            f'{HEALTHY}{{{LLM},deployment="asleep",replica="c"}}': level(0, 0),
            f'{STATUS}{{{LLM},deployment="asleep"}}': level(6, 6),
        },
        {**APP, "deployment": "d"},
    ),
    Trouble("ApplicationFailed", {f"ray_serve_application_status{{{LLM}}}": level(5, 2)}, APP),
    Trouble("ErrorRate", outcomes("engine_error"), APP),
    Trouble("ErrorRate", outcomes("time_out"), APP),
    Trouble(
        "SlowFirstToken",
        {
            f'{TTFT}{{{MODEL},le="1"}}': counter(10, 5),
            f'{TTFT}{{{MODEL},le="4"}}': counter(10, 10),
            f'{TTFT}{{{MODEL},le="+Inf"}}': counter(10, 10),
        },
        {**APP, "model": "tiny"},
    ),
    Trouble("Overload", outcomes("overload"), APP),
    Trouble("KeyAtItsLimits", outcomes("limit", key="team-a"), {**APP, "key": "team-a"}),
    Trouble("KeyAtItsLimits", outcomes("budget", key="team-a"), {**APP, "key": "team-a"}),
    Trouble(
        "GatewayTargetLeftOut",
        {f"{LEFT_OUT}{{{SPARE}}}": level(0, 1)},
        {"application": "gateway", "model": "tiny", "target": "spare"},
    ),
    Trouble(
        "EngineCacheFull",
        {
            f'{KV_CACHE}{{model_name="tiny"}}': level(0.99, 0.99),  # full and nobody waits: well
            f'{WAITING}{{model_name="tiny"}}': level(0, 3),
        },
        {"model_name": "tiny"},
    ),
    Trouble("QueueControllerAway", {"manta_queue_controller": level(1, 0)}, {}),
    Trouble("QueueControllerAway", {"manta_queue_controller": f"1x{HALF_AN_HOUR}"}, {}),
    Trouble("ClusterTellsNothing", {'up{job="ray",instance="a"}': level(1, 0)}, {}),
    Trouble(
        "DiskAlmostFull",
        {'ray_node_disk_utilization_percentage{ip="10.0.0.1"}': level(80, 95)},
        {"ip": "10.0.0.1"},
    ),
]


def rules() -> dict[str, str]:
    """Severity by name."""
    groups = yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"]
    return {rule["alert"]: rule["labels"]["severity"] for g in groups for rule in g["rules"]}


def promtool(*words: str) -> None:
    done = subprocess.run(["promtool", *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tried() -> None:
    assert {trouble.alert for trouble in TROUBLES} == set(rules())


def test_prometheus_takes_the_files_as_they_are(tmp_path: Path) -> None:
    for name in ("prometheus.yml", "alerts.yml"):
        shutil.copy(FOLDER / name, tmp_path)
    for secret in ("cluster_token", "queue_key"):
        (tmp_path / secret).write_text("secret")
    promtool("check", "config", str(tmp_path / "prometheus.yml"))


@pytest.mark.parametrize(
    "trouble", TROUBLES, ids=[f"{t.alert}-{n}" for n, t in enumerate(TROUBLES)]
)
def test_an_alert_fires_in_trouble_and_only_then(trouble: Trouble, tmp_path: Path) -> None:
    labels = {**trouble.fires, "alertname": trouble.alert, "alertstate": "firing"}
    labels["severity"] = rules()[trouble.alert]
    inside = ", ".join(f'{name}="{value}"' for name, value in labels.items())
    query = f'ALERTS{{alertname="{trouble.alert}", alertstate="firing"}}'
    fired = [{"labels": f"ALERTS{{{inside}}}", "value": 1}]
    case = {
        "interval": "10s",
        "input_series": [{"series": k, "values": v} for k, v in trouble.series.items()],
        "promql_expr_test": [
            {"expr": query, "eval_time": "29m", "exp_samples": []},
            {"expr": query, "eval_time": "58m", "exp_samples": fired},
        ],
    }
    file = tmp_path / "test.yml"
    rule_files = [str(FOLDER / "alerts.yml")]
    tests = {"rule_files": rule_files, "evaluation_interval": "10s", "tests": [case]}
    file.write_text(json.dumps(tests))
    promtool("test", "rules", str(file))
