"""Limits per key: never more than the limit in any minute, and soon again as much."""

from __future__ import annotations

import random
from datetime import UTC, datetime

import pytest

from manta.serving.access.limits import REPLICA_TIMEOUT_S, Counter, Denial, Spent
from manta.spec.guard import Limits

T0 = datetime(2026, 11, 22, 12, tzinfo=UTC).timestamp()


class Client:
    """Asks a counter under ever new grant ids."""

    def __init__(self, counter: Counter, limits: Limits, replica: str = "r") -> None:
        self.counter, self.limits, self.replica, self.number = counter, limits, replica, 0

    def ask(self, now: float, num_tokens: int = 1) -> Denial | None:
        self.number += 1
        grant = f"{self.replica}-{self.number}"
        return self.counter.acquire(grant, "k", self.limits, num_tokens, self.replica, now)

    def end(self, now: float, num_tokens: int, number: int | None = None) -> None:
        self.counter.finish(f"{self.replica}-{number or self.number}", num_tokens, now)


def test_no_60_seconds_hold_more_requests_than_the_limit_and_95_percent_of_it_get_in() -> None:
    client, chance = Client(Counter(), Limits(requests_per_min=100)), random.Random(0)
    admitted, now = [], T0
    while now < T0 + 600:  # five times as many as are let in
        now += chance.expovariate(500 / 60)
        if client.ask(now) is None:
            admitted.append(now)
            client.end(now, 1)
    for i, start in enumerate(admitted):
        assert sum(start <= t < start + 60 for t in admitted[i : i + 200]) <= 100
    assert len(admitted) >= 0.95 * 100 * 10


def test_tokens_are_corrected_to_what_was_used_so_that_the_limit_holds_within_5_percent() -> None:
    client, chance = Client(Counter(), Limits(tokens_per_min=10_000)), random.Random(0)
    used, now = [], T0
    running: list[tuple[float, int, int]] = []
    while now < T0 + 600:
        now += chance.expovariate(10)
        for end, tokens, number in [r for r in running if r[0] <= now]:
            client.end(end, tokens, number)
            running.remove((end, tokens, number))
        tokens = chance.randint(1, 200)
        if client.ask(now, num_tokens=200) is None:  # says 200 at most, uses half on average
            running.append((now + 1, tokens, client.number))
            used.append((now, tokens))
    for start, _ in used:
        assert sum(n for t, n in used if start <= t < start + 60) <= 10_000 * 1.05
    assert sum(n for _, n in used) >= 0.95 * 10_000 * 10


def test_retry_after_is_when_there_is_room_again() -> None:
    client = Client(Counter(), Limits(requests_per_min=2))
    assert client.ask(T0) is None
    assert client.ask(T0 + 10) is None
    denial = client.ask(T0 + 20)
    assert denial is not None
    assert denial.code == "rate_limit_exceeded"
    assert denial.retry_after_s == pytest.approx(40, abs=0.3)
    assert client.ask(T0 + 20 + denial.retry_after_s) is None
    assert client.ask(T0 + 20 + denial.retry_after_s) is not None


def test_a_request_larger_than_its_limit_gets_in_alone() -> None:
    client = Client(Counter(), Limits(tokens_per_min=100))
    assert client.ask(T0, 1000) is None
    assert client.ask(T0, 1) is not None
    client.end(T0, 1000)
    assert client.ask(T0 + 59, 1) is not None
    assert client.ask(T0 + 61, 1) is None


def test_slots_are_shared_by_replicas_and_free_when_a_request_ends() -> None:
    counter, limits = Counter(), Limits(concurrent_requests=2)
    one, two = Client(counter, limits, "one"), Client(counter, limits, "two")
    assert one.ask(T0) is None
    assert two.ask(T0) is None
    denial = one.ask(T0)
    assert denial is not None
    assert "2 concurrent requests" in denial.message
    two.end(T0, 0)
    assert one.ask(T0) is None


def test_slots_of_a_replica_that_died_are_freed() -> None:
    counter, limits = Counter(), Limits(concurrent_requests=1)
    dead, alive = Client(counter, limits, "dead"), Client(counter, limits, "alive")
    assert dead.ask(T0) is None
    assert alive.ask(T0 + REPLICA_TIMEOUT_S / 2) is not None
    assert alive.ask(T0 + REPLICA_TIMEOUT_S + 1) is None


def test_a_replica_that_is_heard_of_keeps_its_slots() -> None:
    counter, limits = Counter(), Limits(concurrent_requests=1)
    slow, other = Client(counter, limits, "slow"), Client(counter, limits, "other")
    assert slow.ask(T0) is None
    for second in range(0, 60, 2):
        counter.heartbeat("slow", T0 + second)
    assert other.ask(T0 + 60) is not None


def test_a_budget_ends_with_the_month_and_counts_what_was_used_before_a_restart() -> None:
    client = Client(Counter(), Limits(tokens_per_month=1000))
    client.ask(T0, 10)
    client.counter.at_least("2026-11", {"k": Spent(num_tokens=980)}, T0)
    client.end(T0, 10)
    assert client.ask(T0, 10) is None
    denial = client.ask(T0, 10)
    assert denial is not None
    assert denial.code == "insufficient_quota"
    december = datetime(2026, 12, 1, tzinfo=UTC).timestamp()
    assert T0 + denial.retry_after_s == december
    assert client.ask(december, 10) is None


def test_a_budget_of_money_holds_what_requests_may_cost_and_settles_what_they_did() -> None:
    counter, limits = Counter(), Limits(usd_per_month=1)

    def ask(grant: str, usd: float, now: float = T0) -> Denial | None:
        return counter.acquire(grant, "k", limits, 1, "r", now, usd)

    assert ask("a", 0.7) is None
    denial = ask("b", 0.4)
    assert denial is not None
    assert denial.code == "insufficient_quota"
    assert "$1 is used up" in denial.message
    counter.finish("a", 1, T0, 0.1)
    assert ask("c", 0.9) is None
    counter.finish("c", 1, T0, 0.3)
    counter.at_least("2026-11", {"k": Spent(cost_usd=0.8)}, T0)  # on another cluster, say
    counter.at_least("2026-11", {"k": Spent(cost_usd=0.2)}, T0)
    assert ask("d", 0.3) is not None
    assert ask("e", 0.2) is None
    assert ask("f", 0.0) is None, "what costs nothing is not held back"
    counter.finish("e", 1, T0, 0.2)
    december = datetime(2026, 12, 1, tzinfo=UTC).timestamp()
    assert T0 + denial.retry_after_s == december
    assert ask("g", 1.0, december) is None


def test_a_budget_of_money_is_used_to_its_last_tenth_however_it_is_added_up() -> None:
    counter, limits = Counter(), Limits(usd_per_month=1)
    for number in range(10):
        grant = f"{number}"
        assert counter.acquire(grant, "k", limits, 1, "r", T0, 0.1) is None
        counter.finish(grant, 1, T0, 0.1)
    assert counter.acquire("x", "k", limits, 1, "r", T0, 0.001) is not None


def test_what_a_lost_replica_was_answering_counts_as_reserved() -> None:
    counter, limits = Counter(), Limits(usd_per_month=1)
    assert counter.acquire("a", "k", limits, 1, "gone", T0, 0.9) is None
    late = T0 + REPLICA_TIMEOUT_S + 1
    assert counter.acquire("b", "k", limits, 1, "here", late, 0.2) is not None
    assert counter.acquire("c", "k", limits, 1, "here", late, 0.1) is None


def test_ending_what_was_never_let_in_changes_nothing() -> None:
    client = Client(Counter(), Limits(concurrent_requests=1))
    client.counter.finish("unknown", 100, T0)
    assert client.ask(T0) is None
    client.end(T0, 1)
    client.end(T0, 1)
    assert client.counter.in_use("k") == 0
