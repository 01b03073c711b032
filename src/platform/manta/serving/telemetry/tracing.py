"""Traces of requests with OpenTelemetry: `POST /v1/…` → `limits`, `engine`.

Spans hold who asked which model, how long each step took and what came of it; nothing of what
was asked or answered. A trace that the client began goes on here, and the engine is told where.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

from manta.serving.access.keys import USER_ROUTES

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

    from manta.serving.telemetry.observer import Sight

VARIABLES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
CONTEXT_HEADERS = ("traceparent", "tracestate")
MAX_NAME_CHARS = 100

Headers = list[tuple[bytes, bytes]]


def tracer(collector: str | None, application: str) -> Tracer | None:
    """A tracer that sends to an OTLP collector; None if there is none to send to.

    Args:
        collector: base URL for OTLP over HTTP. None leaves it to OpenTelemetry's own variables.
        application: the service that spans are of, unless `OTEL_SERVICE_NAME` says.
    """
    if not collector and not any(os.environ.get(name) for name in VARIABLES):
        return None
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    named = "OTEL_SERVICE_NAME" in os.environ
    resource = Resource.create({} if named else {"service.name": application})
    provider = TracerProvider(resource=resource)  # samples as OTEL_TRACES_SAMPLER says
    provider.add_span_processor(BatchSpanProcessor(_exporter(collector)))
    return Tracer(provider)


def _exporter(collector: str | None) -> Any:
    from opentelemetry.exporter.otlp.proto.grpc import trace_exporter as grpc
    from opentelemetry.exporter.otlp.proto.http import trace_exporter as http

    if collector:
        return http.OTLPSpanExporter(endpoint=f"{collector.rstrip('/')}/v1/traces")
    protocol = next((os.environ[name] for name in PROTOCOLS if os.environ.get(name)), "")
    return grpc.OTLPSpanExporter() if protocol == "grpc" else http.OTLPSpanExporter()


class Tracer:
    """Begins the trace of each request."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry.trace.propagation import tracecontext

        self.spans = provider.get_tracer("manta")
        self.context = tracecontext.TraceContextTextMapPropagator()

    def begin(self, scope: dict[str, Any], sight: Sight) -> Trace:
        """The request was let in; its limits come next."""
        return Trace(self, scope, sight)


class Trace:
    """The spans of one request."""

    def __init__(self, tracer: Tracer, scope: dict[str, Any], sight: Sight) -> None:
        from opentelemetry.trace import SpanKind

        self._tracer = tracer
        self._offset_s = time.time() - time.perf_counter()
        self._let_in_at = time.perf_counter()
        self._engine: Span | None = None
        method, path = scope["method"], str(scope["path"])
        known = [route for route in USER_ROUTES if path.endswith(route)]
        route = max(known, key=len, default="other")  # the path may have Serve's prefix in front
        self._span = tracer.spans.start_span(
            f"{method} {route}",
            context=tracer.context.extract(_carrier(scope["headers"])),
            kind=SpanKind.SERVER,
            start_time=self._ns(sight.began),
            attributes={"http.request.method": method, "http.route": route},
        )

    def passed_on(self, headers: Headers) -> Headers:
        """The engine begins now: its headers, with the place in the trace where it goes on."""
        from opentelemetry.trace import SpanKind, set_span_in_context

        here = set_span_in_context(self._span)
        start = self._tracer.spans.start_span
        now = time.perf_counter()
        limits = start("limits", context=here, start_time=self._ns(self._let_in_at))
        limits.end(self._ns(now))
        self._engine = start(
            "engine", context=here, kind=SpanKind.CLIENT, start_time=self._ns(now)
        )
        carrier: dict[str, str] = {}
        self._tracer.context.inject(carrier, set_span_in_context(self._engine))
        kept = [
            (name, value)
            for name, value in headers
            if name.decode("latin-1").lower() not in CONTEXT_HEADERS
        ]
        return kept + [(name.encode(), value.encode()) for name, value in carrier.items()]

    def end(self, sight: Sight) -> None:
        """The request has ended as `sight` says."""
        from opentelemetry.trace import StatusCode

        self._span.set_attributes(_attributes(sight))
        meter = sight.meter
        if meter and meter.pace.first_at is not None:
            at = self._ns(meter.pace.first_at)
            (self._engine or self._span).add_event("first token", timestamp=at)
        if sight.status >= 500 or sight.outcome == "engine_error":
            for span in filter(None, (self._span, self._engine)):
                span.set_status(StatusCode.ERROR, sight.outcome)
        if self._engine:
            self._engine.end()
        self._span.end()

    def _ns(self, at: float) -> int:
        """Of `time.perf_counter()`, as spans have it: nanoseconds of UTC."""
        return int((at + self._offset_s) * 1e9)


def _attributes(sight: Sight) -> dict[str, str | int]:
    found: dict[str, str | int] = {
        "http.response.status_code": sight.status,
        "manta.outcome": sight.outcome,
    }
    if sight.model:
        found["gen_ai.request.model"] = sight.model[:MAX_NAME_CHARS]
    if sight.key:
        found |= {"manta.key.id": sight.key.id, "manta.key.name": sight.key.name}
    if sight.meter and sight.admitted_at is not None:
        prompt, completion = sight.meter.tokens()
        found |= {"gen_ai.usage.input_tokens": prompt, "gen_ai.usage.output_tokens": completion}
    return found


def _carrier(headers: Headers) -> dict[str, str]:
    named = ((name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in headers)
    return {name: value for name, value in named if name in CONTEXT_HEADERS}
