"""Traces: which spans a request leaves, where they join the client's, and what is not in them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from pydantic import ValidationError
from watched_guard import CHAT, Watched, watched

from manta.serving.telemetry import tracing
from manta.serving.telemetry.tracing import Tracer
from manta.spec.guard import GuardConfig

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"
Check = Callable[[Watched], Coroutine[Any, Any, None]]


def spans_of(root: Path, check: Check, **config: Any) -> dict[str, ReadableSpan]:
    """Spans by name that are left after `check`."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))

    async def main() -> None:
        async with watched(root, Tracer(provider), **config) as here:
            await check(here)

    asyncio.run(main())
    return {span.name: span for span in exporter.get_finished_spans()}


def engine_was_told(here: Watched) -> str:
    return here.engine.headers[-1][b"traceparent"].decode()


def test_a_request_leaves_a_span_with_its_limits_and_its_engine_below(tmp_path: Path) -> None:
    async def check(here: Watched) -> None:
        await here.ask(here.key("team-a", requests_per_min=5), "stream")

    spans = spans_of(tmp_path, check)
    root = spans[f"POST {CHAT}"]
    assert root.parent is None
    for name in ("limits", "engine"):
        assert spans[name].parent is not None
        assert spans[name].parent.span_id == root.context.span_id
    assert root.start_time <= spans["limits"].start_time <= spans["limits"].end_time
    assert spans["limits"].end_time <= spans["engine"].start_time
    assert spans["engine"].end_time <= root.end_time
    assert root.end_time - root.start_time >= 80e6  # the stream's own pauses, in ns
    known = dict(root.attributes or {})
    assert known["manta.key.name"] == "team-a"
    assert known["gen_ai.request.model"] == "m"
    assert known["gen_ai.usage.input_tokens"] == 7
    assert known["gen_ai.usage.output_tokens"] == 3
    assert known["http.response.status_code"] == 200
    (first,) = spans["engine"].events
    assert first.name == "first token"
    assert spans["engine"].start_time <= first.timestamp <= spans["engine"].end_time


def test_a_clients_trace_goes_on_and_the_engine_goes_on_below_this_span(tmp_path: Path) -> None:
    told = []

    async def check(here: Watched) -> None:
        await here.ask(here.key(), traceparent=TRACEPARENT, tracestate="a=b")
        told.append((engine_was_told(here), here.engine.headers[-1][b"tracestate"]))

    spans = spans_of(tmp_path, check)
    root, engine = spans[f"POST {CHAT}"], spans["engine"]
    assert f"{root.context.trace_id:032x}" == TRACE
    assert root.parent is not None
    assert f"{root.parent.span_id:016x}" == PARENT
    assert told == [(f"00-{TRACE}-{engine.context.span_id:016x}-01", b"a=b")]


def test_a_trace_that_its_client_does_not_sample_leaves_nothing_but_is_passed_on(
    tmp_path: Path,
) -> None:
    told = []

    async def check(here: Watched) -> None:
        await here.ask(here.key(), traceparent=TRACEPARENT[:-2] + "00")
        told.append(engine_was_told(here))

    assert spans_of(tmp_path, check) == {}
    assert told[0].startswith(f"00-{TRACE}-")
    assert told[0].endswith("-00")


@pytest.mark.parametrize("broken", ["", "00", "zz" * 30, f"00-{'0' * 32}-{PARENT}-01", "x" * 5000])
def test_a_traceparent_that_is_none_begins_a_trace_of_its_own(tmp_path: Path, broken: str) -> None:
    told = []

    async def check(here: Watched) -> None:
        assert (await here.ask(here.key(), traceparent=broken)).status_code == 200
        told.append(engine_was_told(here))

    root = spans_of(tmp_path, check)[f"POST {CHAT}"]
    assert root.parent is None
    assert told[0].split("-")[1] == f"{root.context.trace_id:032x}"


def test_without_tracing_a_traceparent_reaches_the_engine_as_it_came(tmp_path: Path) -> None:
    async def main() -> None:
        async with watched(tmp_path) as here:
            await here.ask(here.key(), traceparent=TRACEPARENT)
            assert engine_was_told(here) == TRACEPARENT

    asyncio.run(main())


def test_what_was_asked_and_answered_and_the_secret_are_in_no_span(tmp_path: Path) -> None:
    secrets = []

    async def check(here: Watched) -> None:
        secrets.append(here.key())
        await here.ask(secrets[0], "stream", model="secret-free")

    spans = spans_of(tmp_path, check)
    everything = " ".join(span.to_json() for span in spans.values())
    assert secrets[0] not in everything
    assert "delta" not in everything
    allowed = {"http.", "manta.", "gen_ai.request.model", "gen_ai.usage."}
    for span in spans.values():
        assert all(name.startswith(tuple(allowed)) for name in span.attributes or {})


def test_who_has_no_key_leaves_no_span(tmp_path: Path) -> None:
    async def check(here: Watched) -> None:
        await here.ask("manta_wrong", traceparent=TRACEPARENT)

    assert spans_of(tmp_path, check) == {}


def test_a_request_over_its_limits_never_reaches_an_engine_span(tmp_path: Path) -> None:
    async def check(here: Watched) -> None:
        secret = here.key("spent", tokens_per_month=1)
        assert (await here.ask(secret)).status_code == 429

    spans = spans_of(tmp_path, check)
    assert set(spans) == {f"POST {CHAT}"}
    known = spans[f"POST {CHAT}"].attributes or {}
    assert known["manta.outcome"] == "budget"
    assert "gen_ai.usage.input_tokens" not in known


@pytest.mark.parametrize("script", ["broken", "crash", "stream_fails"])
def test_an_engine_that_fails_marks_its_spans_as_errors(tmp_path: Path, script: str) -> None:
    async def check(here: Watched) -> None:
        await here.ask(here.key(), script)

    spans = spans_of(tmp_path, check)
    for name in (f"POST {CHAT}", "engine"):
        assert spans[name].status.status_code is StatusCode.ERROR


def test_there_is_no_tracer_unless_somebody_says_where_to_send_spans(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in tracing.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert tracing.tracer(None, "llm") is None
    assert tracing.tracer("http://127.0.0.1:9/", "llm") is not None
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    assert tracing.tracer(None, "llm") is not None


def test_an_address_that_is_none_is_refused() -> None:
    with pytest.raises(ValidationError, match="tracing"):
        GuardConfig(tracing="collector:4318")
