"""How applications do right now: two scrapes of what guards tell, and what lies between them."""

from __future__ import annotations

import itertools
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from manta.cluster import dashboard
from manta.cluster.record import ClusterRecord
from manta.errors import MantaError
from manta.serving.telemetry import metrics, observer

REPORT_S = 10.0
"""How often Ray's processes tell their node's agent; nothing changes in between."""
TIMEOUT_S = 5.0
FAILED = frozenset({observer.ENGINE_ERROR, observer.TIME_OUT})
PREFIX = b"ray_manta_"

_FIRST_TOKEN_BUCKET = metrics.PARTS[metrics.FIRST_TOKEN][0].exported
K = TypeVar("K", str, float)

_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass
class Totals:
    """What the replicas of one application have told, together."""

    outcomes: dict[str, float] = field(default_factory=dict)
    """Requests that have ended, by outcome."""
    completion_tokens: float = 0.0
    in_flight: float = 0.0
    first_tokens: dict[float, float] = field(default_factory=dict)
    """Upper bound in seconds → streams whose first token came within it."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """All applications at one time."""

    at: float
    """`time.monotonic()`."""
    apps: Mapping[str, Totals]


@dataclass(frozen=True, kw_only=True)
class Live:
    """How one application does. None is unknown: nothing came in that time."""

    requests_per_s: float
    failed_per_s: float
    """The engine's errors and time-outs."""
    refused_per_s: float
    """Everything else that was not answered: keys, limits, room, bad requests, clients gone."""
    tokens_per_s: float
    """Of answers."""
    in_flight: float
    ttft_p50_s: float | None
    ttft_p99_s: float | None


def sample(cluster: ClusterRecord) -> Sample:
    """Ask every node's agent. Raises MantaError if the cluster tells no metrics."""
    found = dashboard.get(cluster, "/api/prometheus/sd")
    targets = [target for group in found for target in group["targets"]]
    pages = [page for target in targets if (page := _page(target)) is not None]
    if not pages:
        raise MantaError(
            f"cluster `{cluster.name}` tells no metrics",
            "its ports of metrics are closed or out of reach from here; docs/monitoring.md",
        )
    return Sample(at=time.monotonic(), apps=read(pages))


def _page(target: str) -> bytes | None:
    try:
        with _OPENER.open(f"http://{target}/metrics", timeout=TIMEOUT_S) as answer:
            return bytes(answer.read())
    except (OSError, ValueError):  # a node that has just gone, or whose port is closed (-1)
        return None


def read(pages: Iterable[bytes]) -> dict[str, Totals]:
    """Applications by name, from pages in Prometheus' format."""
    from prometheus_client.parser import text_string_to_metric_families

    apps: dict[str, Totals] = {}
    for page in pages:
        ours = [line for line in page.splitlines() if line.startswith(PREFIX)]
        text = b"\n".join([*ours, b""]).decode()
        for family in text_string_to_metric_families(text):
            for one in family.samples:
                totals = apps.setdefault(one.labels.get("application", ""), Totals())
                _add(totals, one.name, one.labels, one.value)
    return apps


def _add(totals: Totals, name: str, labels: Mapping[str, str], value: float) -> None:
    if name == metrics.REQUESTS.exported:
        outcome = labels["outcome"]
        totals.outcomes[outcome] = totals.outcomes.get(outcome, 0.0) + value
    elif name == metrics.TOKENS.exported and labels["kind"] == "completion":
        totals.completion_tokens += value
    elif name == metrics.IN_FLIGHT.exported:
        totals.in_flight += value
    elif name == _FIRST_TOKEN_BUCKET:
        bound = float(labels["le"])
        totals.first_tokens[bound] = totals.first_tokens.get(bound, 0.0) + value


def between(old: Sample, new: Sample) -> dict[str, Live]:
    """How each application did from one sample to the other."""
    seconds = max(new.at - old.at, 1e-9)
    return {
        name: _live(old.apps.get(name, Totals()), totals, seconds)
        for name, totals in sorted(new.apps.items())
    }


def _live(old: Totals, new: Totals, seconds: float) -> Live:
    ended = _grown(old.outcomes, new.outcomes)
    failed = sum(number for outcome, number in ended.items() if outcome in FAILED)
    requests = sum(ended.values()) - ended.get(observer.SENT_ON, 0.0)
    first = _grown(old.first_tokens, new.first_tokens)
    return Live(
        requests_per_s=requests / seconds,
        failed_per_s=failed / seconds,
        refused_per_s=(requests - failed - ended.get(observer.OK, 0.0)) / seconds,
        tokens_per_s=max(0.0, new.completion_tokens - old.completion_tokens) / seconds,
        in_flight=new.in_flight,
        ttft_p50_s=quantile(first, 0.5),
        ttft_p99_s=quantile(first, 0.99),
    )


def _grown(old: Mapping[K, float], new: Mapping[K, float]) -> dict[K, float]:
    """By how much each has grown; one that fell began anew with its replica's node."""
    return {key: max(0.0, value - old.get(key, 0.0)) for key, value in new.items()}


def quantile(counts: Mapping[float, float], q: float) -> float | None:
    """As Prometheus' histogram_quantile: linear within a bucket; None of nothing.

    Args:
        counts: upper bound → how many are at most that, infinity included.
        q: from 0 to 1.
    """
    bounds = sorted(counts)
    total = counts[bounds[-1]] if bounds else 0.0
    if total < 0.5:  # Ray's counters begin at a billionth, see metrics.Ray
        return None
    rank = q * total
    for below, bound in itertools.pairwise([0.0, *bounds]):
        if counts[bound] >= rank:
            before = counts.get(below, 0.0)
            if bound == float("inf"):
                return below
            return below + (bound - below) * (rank - before) / (counts[bound] - before)
    return None
