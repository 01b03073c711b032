"""What the guard tells of requests: who, which model, how fast, and what came of them."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import pytest
from watched_guard import Watched, watched

from manta.serving.telemetry import metrics
from manta.serving.telemetry.observer import MAX_KEYS, MAX_MODELS

REQUESTS = "ray_manta_requests_total"
TOKENS = "ray_manta_tokens_total"


def run(root: Path, check, **config):  # type: ignore[no-untyped-def]
    async def main() -> None:
        async with watched(root, **config) as here:
            await check(here)

    asyncio.run(main())


async def told(here: Watched) -> Watched:
    await here.observer.tell(here.guard.room.most)
    return here


def at_most(here: Watched, name: str, le: str) -> float:
    return here.numbers.get(f"ray_{name}_bucket_total", le=le)


def test_an_answer_counts_for_its_key_and_model_with_its_tokens(tmp_path: Path) -> None:
    async def check(here: Watched) -> None:
        await here.ask(here.key("team-a"))
        numbers = (await told(here)).numbers
        mine = {"key": "team-a", "model": "m"}
        assert numbers.get(REQUESTS, **mine, status="200", outcome="ok") == 1
        assert numbers.get(TOKENS, **mine, kind="prompt") == 7
        assert numbers.get(TOKENS, **mine, kind="completion") == 3
        assert numbers.get("ray_manta_request_seconds_count_total", **mine) == 1
        assert numbers.get("ray_manta_time_to_first_token_seconds_count_total") == 0

    run(tmp_path, check)


def test_a_stream_tells_its_first_token_and_each_gap_between_tokens(tmp_path: Path) -> None:
    async def check(here: Watched) -> None:
        await here.ask(here.key(), "stream")
        numbers = (await told(here)).numbers
        assert numbers.get("ray_manta_time_to_first_token_seconds_count_total", model="m") == 1
        # Three tokens have two gaps: not what opens a chat, tells its use or says DONE.
        assert numbers.get("ray_manta_inter_token_latency_seconds_count_total") == 2
        assert numbers.get("ray_manta_inter_token_latency_seconds_sum_total") >= 0.08
        assert at_most(here, metrics.GAP, "0.01") == 0
        assert at_most(here, metrics.GAP, "0.05") <= 1
        assert at_most(here, metrics.GAP, "+Inf") == 2

    run(tmp_path, check)


@pytest.mark.parametrize(
    ("script", "status", "outcome"),
    [
        ("unknown_model", "404", "bad_request"),
        ("broken", "500", "engine_error"),
        ("crash", "500", "engine_error"),
        ("stream_fails", "200", "engine_error"),
        ("cut_short", "200", "client_gone"),
        ("silent", "504", "time_out"),
    ],
)
def test_what_the_engine_did_is_told(
    tmp_path: Path, script: str, status: str, outcome: str
) -> None:
    async def check(here: Watched) -> None:
        with contextlib.suppress(AssertionError):  # httpx's, of an answer without an end
            await here.ask(here.key(), script)
        numbers = (await told(here)).numbers
        assert numbers.get(REQUESTS, status=status, outcome=outcome, key="team-a") == 1
        assert numbers.get(REQUESTS) == 1
        assert numbers.get("ray_manta_requests_in_flight", key="team-a") == 0

    run(tmp_path, check, request_timeout_s=0.2)


def test_refusals_are_told_by_cause(tmp_path: Path) -> None:
    async def check(here: Watched) -> None:
        limited = here.key("limited", requests_per_min=1)
        spent = here.key("spent", tokens_per_month=1)
        await here.ask("manta_wrong_key")
        for secret in (limited, limited, spent):
            await here.ask(secret)
        await here.ask(limited, model="m" * 5000)
        numbers = (await told(here)).numbers
        assert numbers.get(REQUESTS, outcome="no_key", key="", status="401") == 1
        assert numbers.get(REQUESTS, outcome="ok", key="limited") == 1
        assert numbers.get(REQUESTS, outcome="limit", key="limited", status="429") == 1
        assert numbers.get(REQUESTS, outcome="budget", key="spent", status="429") == 1
        assert numbers.get(REQUESTS, outcome="too_large", status="413") == 1
        assert numbers.get(TOKENS, kind="prompt") == 7
        # What was refused has no times: a flood of refusals must not look like a fast engine.
        assert numbers.get("ray_manta_request_seconds_count_total") == 1

    run(tmp_path, check, max_body_bytes=4000)


def test_overload_is_told_and_so_is_how_full_a_replica_is(tmp_path: Path) -> None:
    async def check(here: Watched) -> None:
        secret = here.key()
        waiting = [asyncio.create_task(here.ask(secret, "silent")) for _ in range(2)]
        while here.observer.num_in_flight < 2:
            await asyncio.sleep(0.01)
        assert (await here.ask(secret)).status_code == 503
        numbers = (await told(here)).numbers
        assert numbers.get("ray_manta_requests_in_flight", key="team-a") == 2
        assert numbers.get("ray_manta_requests_in_flight_max") == 2
        assert numbers.get(REQUESTS, outcome="overload", status="503") == 1
        waiting[0].cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await waiting[0]
        numbers = (await told(here)).numbers
        assert numbers.get("ray_manta_requests_in_flight", key="team-a") == 1
        assert numbers.get(REQUESTS, outcome="client_gone", status="499") == 1
        here.engine.hold.set()
        await waiting[1]
        assert (await told(here)).numbers.get("ray_manta_requests_in_flight") == 0

    run(tmp_path, check, max_requests_in_flight=2)


def test_clients_cannot_make_up_series(tmp_path: Path) -> None:
    async def check(here: Watched) -> None:
        secret = here.key()
        others = [here.key(f"key-{number}") for number in range(MAX_KEYS + 5)]
        for number in range(MAX_MODELS + 20):
            await here.ask(secret, "unknown_model", model=f"made-up-{number}")
        await told(here)
        assert here.numbers.label("model") == {""}
        for number in range(MAX_MODELS + 20):
            await here.ask(secret, model=f"served-{number}")
        await told(here)
        assert len(here.numbers.label("model")) == MAX_MODELS + 2  # "" and "other"
        for other in others:
            await here.ask(other)
        await told(here)
        assert len(here.numbers.label("key")) == MAX_KEYS + 1  # "other"
        assert here.numbers.get(REQUESTS, key="other") == 6

    run(tmp_path, check)


def test_no_secret_is_in_any_label(tmp_path: Path) -> None:
    async def check(here: Watched) -> None:
        secret = here.key()
        await here.ask(secret)
        await here.ask(secret + "x")
        for _, labels in (await told(here)).numbers.values:
            assert not any(value and value in secret for _, value in labels if len(value) > 8)

    run(tmp_path, check)


def test_every_bound_is_told_so_that_quantiles_are_not_bent(tmp_path: Path) -> None:
    async def check(here: Watched) -> None:
        await here.ask(here.key(), "stream")
        await told(here)
        for name, bounds in metrics.BOUNDS_S.items():
            has = {
                dict(labels)["le"]
                for told_name, labels in here.numbers.values
                if told_name == f"ray_{name}_bucket_total"
            }
            assert has == {f"{bound:g}" for bound in bounds} | {"+Inf"}

    run(tmp_path, check)


def test_numbers_that_cannot_be_told_stop_no_request(tmp_path: Path) -> None:
    async def check(here: Watched) -> None:
        def away(*arguments: object) -> None:
            raise ConnectionError("the agent of metrics is away")

        here.numbers.add = away  # type: ignore[method-assign]
        assert (await here.ask(here.key())).status_code == 200
        await here.guard.stop()

    run(tmp_path, check)
