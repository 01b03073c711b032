"""Which replica is wrongly slow: found by comparing, bounded, and with patience."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from manta.serving.guard import slowness
from manta.serving.guard.slowness import Board, Judge, Waits, is_slow


@dataclass(eq=False)
class Answer:
    first_byte_s: float | None = None


def test_who_waits_far_longer_than_most_others_is_slow() -> None:
    assert is_slow(3.0, [0.1])
    assert is_slow(3.0, [0.1, 0.2, 2.0])
    assert not is_slow(0.4, [0.01]), "five times as long, and still quick"
    assert not is_slow(3.0, [1.0])
    assert not is_slow(3.0, []), "nobody to compare with"


@pytest.mark.parametrize("num_replicas", range(1, 9))
@pytest.mark.parametrize("num_slow", range(9))
def test_at_most_half_are_taken_out_and_never_all(num_replicas: int, num_slow: int) -> None:
    waits = [10.0] * min(num_slow, num_replicas) + [0.01] * max(0, num_replicas - num_slow)
    out = [
        number
        for number, own in enumerate(waits)
        if is_slow(own, waits[:number] + waits[number + 1 :])
    ]
    assert len(out) <= num_replicas // 2
    if 0 < num_slow <= (num_replicas - 1) // 2:
        assert len(out) == num_slow


def test_requests_that_still_wait_count_once_they_are_the_longest() -> None:
    waits = Waits()
    hanging = [Answer() for _ in range(slowness.MIN_REQUESTS)]
    for answer in hanging:
        waits.begin(answer, 100.0)
    assert waits.median_s(103.0) == pytest.approx(3.0)
    for answer in hanging:
        answer.first_byte_s = 0.2  # a stream that goes on
    assert waits.median_s(130.0) == pytest.approx(0.2)
    for answer in hanging:
        waits.end(answer, 131.0)
    assert waits.median_s(132.0) == pytest.approx(0.2)
    assert waits.median_s(131.0 + slowness.WINDOW_S + 1) is None


def test_it_has_to_be_slow_for_a_while_without_a_break_and_then_stays_so() -> None:
    judge = Judge()
    for now in (0.0, 10.0):
        judge.hear(5.0, [0.1], now)
    judge.hear(0.1, [0.1], 15.0)
    for now in (20.0, 30.0, 39.0):
        judge.hear(5.0, [0.1], now)
    assert not judge.is_slow
    judge.hear(5.0, [0.1], 40.0)
    assert judge.is_slow
    judge.hear(None, [], 60.0)
    assert judge.is_slow, "nobody asks it any more"


def test_the_board_forgets_who_tells_nothing_and_keeps_applications_apart() -> None:
    board = Board()
    assert board.tell("a", "one", 0.1, 0.0) == []
    assert board.tell("b", "two", 0.2, 1.0) == []
    assert board.tell("a", "three", 0.3, 2.0) == [0.1]
    assert board.tell("a", "three", 0.3, slowness.STALE_S + 1) == []
