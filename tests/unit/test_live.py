"""`manta apps --watch`: figures from two scrapes, and what is shown of them."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from manta.cli import watch_apps
from manta.cli.main import main
from manta.cluster import record
from manta.cluster.record import ClusterRecord
from manta.serving.telemetry import live
from manta.serving.telemetry.live import Sample

LABELS = 'application="llm",deployment="D",replica="r1",WorkerId="w",key="a",model="m"'
INF = float("inf")


def page(ok: int, failed: int = 0, limited: int = 0, tokens: int = 0, slow: int = 0) -> bytes:
    """As Ray's agent serves it, with lines of others between."""
    bucket = "ray_manta_time_to_first_token_seconds_bucket_total"
    return f"""# HELP ray_manta_requests_total Requests
# TYPE ray_manta_requests_total counter
ray_manta_requests_total{{{LABELS},outcome="ok",status="200"}} {ok}.0
ray_manta_requests_total{{{LABELS},outcome="engine_error",status="500"}} {failed}.0
ray_manta_requests_total{{{LABELS},outcome="limit",status="429"}} {limited}.0
ray_manta_tokens_total{{{LABELS},kind="completion"}} {tokens}
ray_manta_tokens_total{{{LABELS},kind="prompt"}} 1e6
ray_manta_requests_in_flight{{application="llm",key="a"}} 3.0
{bucket}{{{LABELS},le="0.1"}} {ok - slow}
{bucket}{{{LABELS},le="0.2"}} {ok}
{bucket}{{{LABELS},le="+Inf"}} {ok}
ray_node_disk_free{{ip="127.0.0.1"}} 5.0
""".encode()


def sampled(at: float, *pages: bytes) -> Sample:
    return Sample(at=at, apps=live.read(pages))


def test_figures_are_what_lies_between_two_scrapes_over_all_nodes() -> None:
    old = sampled(100.0, page(100), page(10))
    new = sampled(110.0, page(150, failed=10, limited=20, tokens=500), page(60, tokens=100))
    found = live.between(old, new)["llm"]
    assert found.requests_per_s == pytest.approx(13.0)
    assert found.failed_per_s == pytest.approx(1.0)
    assert found.refused_per_s == pytest.approx(2.0)
    assert found.tokens_per_s == pytest.approx(60.0)
    assert found.in_flight == 6
    assert found.ttft_p50_s == pytest.approx(0.05)


def test_what_a_candidate_answered_is_not_counted_as_refused_here() -> None:
    sent_on = f'ray_manta_requests_total{{{LABELS},outcome="sent_on",status="200"}} 50.0\n'
    found = live.between(sampled(0, page(0)), sampled(10, page(10), sent_on.encode()))["llm"]
    assert (found.requests_per_s, found.refused_per_s) == (1.0, 0.0)


def test_a_replica_that_began_anew_makes_no_negative_figures() -> None:
    found = live.between(sampled(0, page(100, tokens=9)), sampled(10, page(5)))["llm"]
    assert found.requests_per_s == 0
    assert found.tokens_per_s == 0
    assert found.ttft_p99_s is None


def test_an_application_that_is_new_counts_from_nothing() -> None:
    assert live.between(sampled(0), sampled(10, page(50)))["llm"].requests_per_s == 5


@pytest.mark.parametrize(
    ("counts", "q", "value"),
    [
        ({}, 0.5, None),
        ({0.1: 1e-9, INF: 1e-9}, 0.5, None),
        ({0.1: 0, 0.2: 10, INF: 10}, 0.5, 0.15),
        ({0.1: 90, 0.2: 100, INF: 100}, 0.99, 0.19),
        ({0.1: 0, 0.2: 0, INF: 10}, 0.5, 0.2),  # beyond the last bound: at least that
    ],
)
def test_quantiles_are_those_of_prometheus(
    counts: dict[float, float], q: float, value: float | None
) -> None:
    found = live.quantile(counts, q)
    assert found == (None if value is None else pytest.approx(value))


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert isinstance(ended.value.code, int)
    return ended.value.code


class Ray(BaseHTTPRequestHandler):
    """The dashboard's three answers and a node's page of metrics, on one port."""

    scrapes = 0
    targets: tuple[str, ...] = ()

    def do_GET(self) -> None:
        kind = type(self)
        if self.path == "/metrics":
            kind.scrapes += 1
            self.answer(page(ok=100 * kind.scrapes))
        elif self.path == "/api/prometheus/sd":
            here = f"127.0.0.1:{self.server.server_address[1]}"
            targets = [*kind.targets, here] if kind.targets != ("none",) else ["127.0.0.1:-1"]
            self.answer(json.dumps([{"labels": {"job": "ray"}, "targets": targets}]).encode())
        else:
            one = {"name": "D", "status": "HEALTHY", "replicas": [], "target_num_replicas": 1}
            app: dict[str, Any] = {"status": "RUNNING", "route_prefix": "/", "message": ""}
            app |= {"deployments": {"D": one | {"message": ""}}, "deployed_app_config": None}
            self.answer(json.dumps({"applications": {"llm": app}}).encode())

    def answer(self, body: bytes) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Ray]]:
    """A cluster `local` that is nothing but these answers."""
    monkeypatch.setenv("MANTA_HOME", str(tmp_path))
    kind = type("Ray", (Ray,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    facts = {"gcs_address": "", "token_path": "", "temp_dir": "", "started_at": ""}
    cluster = ClusterRecord(
        name="local",
        cluster_id="c",
        pid=0,
        dashboard_url=url,
        serve_url=url,
        storage_url=str(tmp_path),
        **facts,
    )
    record.save(cluster)
    yield kind
    server.shutdown()
    server.server_close()


def test_json_is_printed_once_with_figures_per_application(
    ray: type[Ray], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(live, "REPORT_S", 0.1)
    monkeypatch.setattr(watch_apps, "POLL_S", 0.1)
    assert run("apps", "--watch", "--json") == 0
    (app,) = json.loads(capsys.readouterr().out)
    assert (app["name"], app["status"]) == ("llm", "RUNNING")
    assert app["live"]["requests_per_s"] > 100
    assert ray.scrapes == 2


def test_a_node_that_does_not_answer_hides_no_others(ray: type[Ray]) -> None:
    ray.targets = ("127.0.0.1:-1", "127.0.0.1:1")
    assert live.sample(record.load("local")).apps["llm"].outcomes["ok"] == 100


def test_a_cluster_whose_metrics_are_closed_gets_one_line(
    ray: type[Ray], capsys: pytest.CaptureFixture[str]
) -> None:
    ray.targets = ("none",)
    assert run("apps", "--watch", "--json") == 1
    assert "tells no metrics" in capsys.readouterr().err


def test_the_table_goes_on_until_ctrl_c_and_then_ends_quietly(
    ray: type[Ray], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ctrl_c_after_two(seconds: float) -> None:
        if ray.scrapes == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(watch_apps.time, "sleep", ctrl_c_after_two)
    assert run("apps", "--watch") == 0
    first, second = (
        line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("llm")
    )
    assert first[:5] == ["llm", "RUNNING", "0", "of", "1"]
    assert first[5] == "0.0"
    assert float(second[5]) > 0
