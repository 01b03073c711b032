"""What the guard tells of itself: every metric by name, and how what was counted becomes numbers.

Counted in this process and told a few times a minute: one call of Ray's metrics costs 4 µs, and
its agent replays each value of a histogram one by one, which a stream has for every token. So a
distribution is told as counters, one for each upper bound `le`; `histogram_quantile` reads them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from manta.serving.request.pace import ITL_BOUNDS_S, Distribution


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Metric:
    """A name with labels, as Ray is told; it adds where it was: application, deployment, replica.

    Prometheus sees `ray_NAME_total` of a counter and `ray_NAME` of a gauge.
    """

    name: str
    kind: Literal["counter", "gauge"]
    description: str
    labels: tuple[str, ...]

    @property
    def exported(self) -> str:
        """Its name as Prometheus sees it."""
        return f"ray_{self.name}_total" if self.kind == "counter" else f"ray_{self.name}"


def _distribution(name: str, description: str) -> tuple[Metric, Metric, Metric]:
    parts = {
        "bucket": (f"{description}: how many took at most `le`", ("model", "key", "le")),
        "sum": (f"{description}: all together", ("model", "key")),
        "count": (f"{description}: how many", ("model", "key")),
    }
    bucket, total, count = (
        Metric(name=f"{name}_{part}", kind="counter", description=text, labels=labels)
        for part, (text, labels) in parts.items()
    )
    return bucket, total, count


REQUESTS = Metric(
    name="manta_requests",
    kind="counter",
    description="Requests that have ended, by HTTP status and what came of them",
    labels=("model", "key", "status", "outcome"),
)
TOKENS = Metric(
    name="manta_tokens",
    kind="counter",
    description="Tokens of prompts (`kind` prompt) and of answers (completion)",
    labels=("model", "key", "kind"),
)
IN_FLIGHT = Metric(
    name="manta_requests_in_flight",
    kind="gauge",
    description="Requests that were let in and have not ended",
    labels=("key",),
)
ROOM = Metric(
    name="manta_requests_in_flight_max",
    kind="gauge",
    description="How many requests the replica lets in at once",
    labels=(),
)
ADMISSION = "manta_admission_seconds"
FIRST_TOKEN = "manta_time_to_first_token_seconds"
GAP = "manta_inter_token_latency_seconds"
DURATION = "manta_request_seconds"
_TEXTS = {
    ADMISSION: "Seconds from a request to the engine: key, body, limits",
    FIRST_TOKEN: "Seconds from a request to the first event of its stream",
    GAP: "Seconds between two messages of a stream",
    DURATION: "Seconds from a request to the last byte of its answer",
}
BOUNDS_S = {
    ADMISSION: (0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 0.5, 1.0, 5.0, 30.0),
    FIRST_TOKEN: (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
    GAP: ITL_BOUNDS_S,
    DURATION: (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0),
}
PARTS = {name: _distribution(name, text) for name, text in _TEXTS.items()}

ALL = (REQUESTS, TOKENS, IN_FLIGHT, ROOM, *(one for parts in PARTS.values() for one in parts))
"""Every metric of a guard."""


class Sink(Protocol):
    """Where numbers go."""

    def add(self, metric: Metric, labels: Mapping[str, str], amount: float) -> None:
        """A counter has grown by so much; 0 only says that it is there."""

    def set(self, metric: Metric, labels: Mapping[str, str], value: float) -> None:
        """A gauge stands there now."""


class Ray:
    """Tells Ray, whose agent on each node serves everything to Prometheus.

    In a Serve replica its application, deployment and id are added to the labels.
    """

    _NOTHING = 1e-9  # Ray refuses 0, and a bucket that is missing bends every quantile

    def __init__(self, which: Iterable[Metric] = ALL) -> None:
        from ray.serve import metrics

        self._made = {
            one.name: (metrics.Counter if one.kind == "counter" else metrics.Gauge)(
                one.name, one.description, one.labels
            )
            for one in which
        }

    def add(self, metric: Metric, labels: Mapping[str, str], amount: float) -> None:
        """A counter has grown."""
        self._made[metric.name].inc(amount or self._NOTHING, dict(labels))

    def set(self, metric: Metric, labels: Mapping[str, str], value: float) -> None:
        """A gauge stands there now."""
        self._made[metric.name].set(value, dict(labels))


class News:
    """What was counted since it was last told."""

    def __init__(self) -> None:
        self.counts: dict[tuple[Metric, tuple[str, ...]], float] = {}
        self.times: dict[tuple[str, str, str], Distribution] = {}
        self.levels: dict[tuple[Metric, tuple[str, ...]], float] = {}

    def count(self, metric: Metric, *labels: str, amount: float = 1) -> None:
        """A counter grows; labels in the metric's order."""
        at = metric, labels
        self.counts[at] = self.counts.get(at, 0) + amount

    def times_of(self, name: str, model: str, key: str) -> Distribution:
        """The distribution to add to."""
        found = self.times.get((name, model, key))
        if found is None:
            found = self.times[name, model, key] = Distribution(BOUNDS_S[name])
        return found

    def tell(self, sink: Sink) -> None:
        """Say all of it."""
        for (metric, labels), amount in self.counts.items():
            sink.add(metric, dict(zip(metric.labels, labels, strict=True)), amount)
        for (name, model, key), times in self.times.items():
            for metric, more, amount in _parts(name, times):
                sink.add(metric, {"model": model, "key": key} | more, amount)
        for (metric, labels), value in self.levels.items():
            sink.set(metric, dict(zip(metric.labels, labels, strict=True)), value)


def _parts(name: str, times: Distribution) -> Iterator[tuple[Metric, dict[str, str], float]]:
    bucket, total, count = PARTS[name]
    so_far = 0
    for bound, number in zip(times.bounds, times.counts[:-1], strict=True):
        so_far += number
        yield bucket, {"le": f"{bound:g}"}, so_far
    yield bucket, {"le": "+Inf"}, sum(times.counts)
    yield total, {}, times.total
    yield count, {}, sum(times.counts)
