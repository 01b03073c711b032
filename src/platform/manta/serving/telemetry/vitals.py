"""How the requests of each replica fare, kept in storage so that a deploy can compare versions.

    vitals/REPLICA.json     counts since the replica started, rewritten by it

A replica that is killed loses the seconds since its last write. Files are of some kB, and stay.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from manta import storage

FOLDER = "vitals"
MIN_REQUESTS = 20
"""Fewer say nothing about a share that fails."""
MIN_LATENCIES = 50
"""Fewer say nothing about their 95th percentile."""
_SMALLEST_S, _STEP = 0.001, 1.2  # bounds of the latency buckets


@dataclass(frozen=True, kw_only=True)
class Vitals:
    """Counts of one or more replicas."""

    num_requests: int = 0
    """Those that asked a model and were let in; not those whose client went away."""
    num_errors: int = 0
    """Those that were answered with 5xx, or cut."""
    buckets: tuple[tuple[int, int], ...] = ()
    """Bucket of the time to the first byte of the body, and how many were in it."""

    def plus(self, other: Vitals) -> Vitals:
        """Both together."""
        buckets = Counter(dict(self.buckets)) + Counter(dict(other.buckets))
        return Vitals(
            num_requests=self.num_requests + other.num_requests,
            num_errors=self.num_errors + other.num_errors,
            buckets=tuple(sorted(buckets.items())),
        )

    def minus(self, before: Vitals) -> Vitals:
        """What came after `before`, which is part of it."""
        buckets = Counter(dict(self.buckets)) - Counter(dict(before.buckets))
        return Vitals(
            num_requests=self.num_requests - before.num_requests,
            num_errors=self.num_errors - before.num_errors,
            buckets=tuple(sorted(buckets.items())),
        )

    @property
    def error_rate(self) -> float:
        """Share of requests that failed; 0 if there was none."""
        return self.num_errors / self.num_requests if self.num_requests else 0.0

    @property
    def num_latencies(self) -> int:
        """Answers whose latency is known."""
        return sum(count for _, count in self.buckets)

    @property
    def p95_s(self) -> float:
        """The 95th percentile of the latency, up to a fifth too high; 0 if none is known."""
        left = math.ceil(0.95 * self.num_latencies)
        for bucket, count in self.buckets:
            left -= count
            if left <= 0:
                return _SMALLEST_S * _STEP**bucket
        return 0.0


class VitalsWriter:
    """Counts the requests of one replica."""

    def __init__(self, root: str, replica_id: str) -> None:
        self._url = _file(root, replica_id)
        self._num_requests = self._num_errors = self._num_saved = 0
        self._buckets: Counter[int] = Counter()

    def add(self, failed: bool, latency_s: float | None) -> None:
        """Note one request; `latency_s` is None if its answer had no body."""
        self._num_requests += 1
        self._num_errors += failed
        if latency_s is not None and not failed:
            self._buckets[_bucket(latency_s)] += 1

    def flush(self) -> None:
        """Write what is new. Raises MantaError if it cannot."""
        if (now := self._num_requests) != self._num_saved:
            value = {
                "num_requests": now,
                "num_errors": self._num_errors,
                "buckets": sorted(self._buckets.items()),
            }
            storage.write_json(self._url, value)
            self._num_saved = now


def read(root: str, replica_ids: Iterable[str]) -> Vitals:
    """The vitals of these replicas together; one that was never asked counts nothing.

    Raises:
        InputError: the storage cannot be read.
    """
    total = Vitals()
    for url in (_file(root, replica_id) for replica_id in sorted(replica_ids)):
        if storage.exists(url):
            value = storage.read_json(url)
            buckets = tuple((int(bucket), int(count)) for bucket, count in value["buckets"])
            total = total.plus(
                Vitals(
                    num_requests=value["num_requests"],
                    num_errors=value["num_errors"],
                    buckets=buckets,
                )
            )
    return total


def worse(
    old: Vitals,
    new: Vitals,
    max_error_rate: float,
    max_latency_ratio: float,
    when: str = "before",
    min_requests: int = MIN_REQUESTS,
) -> str | None:
    """What is worse with the new version, in a line; None if nothing is, or too little is known.

    Args:
        old: the version before, since its replicas started.
        new: the new version.
        max_error_rate: share of requests by which more may fail than did before.
        max_latency_ratio: of the 95th percentiles of the time to the first byte.
        when: what is known of the old version is from then.
        min_requests: fewer of the new version say nothing about a share that fails.
    """
    if new.num_requests >= min_requests and new.error_rate > old.error_rate + max_error_rate:
        return (
            f"{new.num_errors} of {new.num_requests} requests fail ({new.error_rate:.1%}); "
            f"{when}, {old.error_rate:.1%} did"
        )
    known = min(new.num_latencies, old.num_latencies) >= MIN_LATENCIES
    if known and new.p95_s > max_latency_ratio * old.p95_s:
        return f"first byte after {new.p95_s:.2f} s (p95); {when}, after {old.p95_s:.2f} s"
    return None


def _bucket(latency_s: float) -> int:
    return max(0, math.ceil(math.log(max(latency_s, _SMALLEST_S) / _SMALLEST_S, _STEP)))


def _file(root: str, replica_id: str) -> str:
    return storage.join(root, FOLDER, f"{replica_id}.json")
