"""The Grafana dashboard as code: `python configs/monitoring/dashboard.py` writes dashboard.json.

Import that in Grafana (Dashboards, New, Import), or put it where its provisioning looks.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COLUMNS, HEIGHT = 3, 8
OF = 'application=~"$application",key=~"$key",model=~"$model"'
OF_APP = 'application=~"$application"'
WINDOW = "[$__rate_interval]"


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One graph; `lines` is legend → PromQL, in Grafana's unit."""

    title: str
    unit: str
    lines: dict[str, str]
    description: str = ""


def rate(name: str, by: str, where: str = OF) -> str:
    """Of a counter, per second."""
    return f"sum by ({by}) (rate({name}{{{where}}}{WINDOW}))"


def quantiles(name: str, by: str) -> dict[str, str]:
    """p50 and p99 of a distribution that the guard tells."""
    told = rate(f"ray_{name}_seconds_bucket_total", f"le, {by}")
    return {
        f"p{q * 100:.0f} {{{{{by}}}}}": f"histogram_quantile({q}, {told})" for q in (0.5, 0.99)
    }


def engine_rate(name: str) -> str:
    """Of a counter that vLLM tells, per second and model."""
    return f"sum by (model_name) (rate(ray_vllm_{name}_total{WINDOW}))"


def engine_quantile(name: str, q: float = 0.99) -> str:
    """Of a histogram that vLLM tells."""
    inside = f"sum by (le, model_name) (rate(ray_vllm_{name}_bucket{WINDOW}))"
    return f"histogram_quantile({q}, {inside})"


REQUESTS = "ray_manta_requests_total"
ROWS: dict[str, list[Panel]] = {
    "Requests": [
        Panel(
            title="Requests by outcome",
            unit="reqps",
            lines={"{{outcome}}": rate(REQUESTS, "outcome")},
            description="ok; refused: no_key, forbidden, limit, budget, overload, too_large, "
            "bad_request; failed: time_out, client_gone, engine_error",
        ),
        Panel(
            title="Requests by key",
            unit="reqps",
            lines={"{{key}}": rate(REQUESTS, "key")},
        ),
        Panel(
            title="Share that fails or finds no room",
            unit="percentunit",
            lines={
                "fails": rate(REQUESTS, "application", OF + ',outcome=~"engine_error|time_out"')
                + " / "
                + rate(REQUESTS, "application"),
                "no room": rate(REQUESTS, "application", OF + ',outcome="overload"')
                + " / "
                + rate(REQUESTS, "application"),
            },
        ),
        Panel(
            title="In flight, and room",
            unit="short",
            lines={
                "{{key}}": f"sum by (key) (ray_manta_requests_in_flight{{{OF_APP}}})",
                "room": f"sum(ray_manta_requests_in_flight_max{{{OF_APP}}})",
            },
        ),
        Panel(
            title="Tokens",
            unit="short",
            lines={"{{kind}} {{model}}": rate("ray_manta_tokens_total", "kind, model")},
            description="Per second: what the engine counted of prompts and answers",
        ),
        Panel(
            title="Over limits or budget, by key",
            unit="reqps",
            lines={
                "{{key}} {{outcome}}": rate(
                    REQUESTS, "key, outcome", OF + ',outcome=~"limit|budget"'
                )
            },
        ),
    ],
    "Speed": [
        Panel(
            title="Time to first token",
            unit="s",
            lines=quantiles("manta_time_to_first_token", "model"),
            description="From the guard's sight of the request to the first event of its stream",
        ),
        Panel(
            title="Inter-token latency",
            unit="s",
            lines=quantiles("manta_inter_token_latency", "model"),
        ),
        Panel(
            title="Whole request",
            unit="s",
            lines=quantiles("manta_request", "model"),
        ),
        Panel(
            title="Before the engine",
            unit="s",
            lines=quantiles("manta_admission", "application"),
            description="Key, body, limits: from the request to the engine",
        ),
        Panel(
            title="Waiting in the engine",
            unit="s",
            lines={"p99 {{model_name}}": engine_quantile("request_queue_time_seconds")},
        ),
        Panel(
            title="Time to first token, by key",
            unit="s",
            lines={"p99 {{key}}": quantiles("manta_time_to_first_token", "key")["p99 {{key}}"]},
        ),
    ],
    "Engine and replicas": [
        Panel(
            title="Healthy replicas",
            unit="short",
            lines={
                "{{application}} {{deployment}}": "sum by (application, deployment) "
                f"(ray_serve_deployment_replica_healthy{{{OF_APP}}})"
            },
        ),
        Panel(
            title="Sequences in the engine",
            unit="short",
            lines={
                "running {{model_name}}": "sum by (model_name) (ray_vllm_num_requests_running)",
                "waiting {{model_name}}": "sum by (model_name) (ray_vllm_num_requests_waiting)",
            },
        ),
        Panel(
            title="KV cache in use",
            unit="percentunit",
            lines={"{{model_name}}": "max by (model_name) (ray_vllm_kv_cache_usage_perc)"},
        ),
        Panel(
            title="Prompts found in the prefix cache",
            unit="percentunit",
            lines={
                "{{model_name}}": engine_rate("prefix_cache_hits")
                + " / "
                + engine_rate("prefix_cache_queries")
            },
        ),
        Panel(
            title="Preemptions",
            unit="short",
            lines={"{{model_name}}": engine_rate("num_preemptions")},
            description="Per second: sequences that lost their place in the KV cache",
        ),
        Panel(
            title="GPU and CPU",
            unit="percent",
            lines={
                "GPU {{ip}}": "avg by (ip) (ray_node_gpus_utilization)",
                "CPU {{ip}}": "avg by (ip) (ray_node_cpu_utilization)",
            },
        ),
    ],
    "Queue": [
        Panel(
            title="Jobs by state",
            unit="short",
            lines={"{{state}}": 'manta_queue_jobs{state=~"QUEUED|STARTING|RUNNING"}'},
        ),
        Panel(
            title="A controller is at work",
            unit="bool_yes_no",
            lines={"": "max(manta_queue_controller)"},
        ),
    ],
}


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana imports it."""
    return {
        "uid": "manta-serving",
        "title": "Manta: endpoints",
        "tags": ["manta"],
        "schemaVersion": 39,
        "time": {"from": "now-1h", "to": "now"},
        "refresh": "10s",
        "templating": {"list": [_source(), *map(_variable, ("application", "model", "key"))]},
        "panels": list(_panels()),
    }


def _source() -> dict[str, Any]:
    return {"name": "source", "type": "datasource", "query": "prometheus", "label": "Prometheus"}


def _variable(label: str) -> dict[str, Any]:
    return {
        "name": label,
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "$source"},
        "query": f"label_values({REQUESTS}, {label})",
        "includeAll": True,
        "allValue": ".*",  # also requests without a key or model, which have an empty label
        "multi": True,
        "current": {"text": "All", "value": "$__all"},
        "refresh": 2,
    }


def _panels() -> Any:
    number, y = 0, 0
    for row, panels in ROWS.items():
        number += 1
        yield {"id": number, "type": "row", "title": row, "gridPos": _place(0, y, 24, 1)}
        y += 1
        for index, panel in enumerate(panels):
            number += 1
            width = 24 // COLUMNS
            at = _place(index % COLUMNS * width, y + index // COLUMNS * HEIGHT, width, HEIGHT)
            yield _panel(number, panel, at)
        y += -(-len(panels) // COLUMNS) * HEIGHT


def _place(x: int, y: int, w: int, h: int) -> dict[str, int]:
    return {"x": x, "y": y, "w": w, "h": h}


def _panel(number: int, panel: Panel, at: dict[str, int]) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "$source"}
    return {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.description,
        "datasource": source,
        "gridPos": at,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "targets": [
            {"refId": chr(65 + index), "datasource": source, "expr": expr, "legendFormat": legend}
            for index, (legend, expr) in enumerate(panel.lines.items())
        ],
    }


if __name__ == "__main__":
    path = Path(__file__).with_name("dashboard.json")
    path.write_text(json.dumps(dashboard(), indent=2) + "\n")
