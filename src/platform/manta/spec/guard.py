"""What an LLM application may say about its guard: `guard` beside `llm_configs` in its args."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from manta.spec.loading import Spec

Redaction = Literal["email", "phone", "card", "key"]


class Limits(Spec):
    """What one key may use at most; None is no limit."""

    requests_per_min: int | None = Field(None, ge=1)
    tokens_per_min: int | None = Field(None, ge=1)
    """Prompt and completion tokens together."""
    concurrent_requests: int | None = Field(None, ge=1)
    """Requests that are being answered, streams until their last byte."""
    tokens_per_month: int | None = Field(None, ge=1)
    """By calendar month in UTC."""
    usd_per_month: float | None = Field(None, gt=0, allow_inf_nan=False)
    """At the `prices` of the applications; a model without one costs nothing."""


class Price(Spec):
    """What a model's tokens cost."""

    prompt_usd_per_million: float = Field(0, ge=0)
    completion_usd_per_million: float = Field(0, ge=0)


class CacheConfig(Spec):
    """Answers that a replica keeps for identical deterministic requests of one key."""

    max_bytes: int = Field(64 * 2**20, ge=2**16)
    """Of one replica's memory; one answer may take a sixteenth."""
    ttl_s: float = Field(3600, gt=0)
    """An older answer is asked for anew."""


class PromptLogConfig(Spec):
    """Which prompts and answers are written down, and for how long."""

    sample: float = Field(0.01, gt=0, le=1)
    """Part of the requests, drawn at random."""
    redact: tuple[Redaction, ...] = ("email", "phone", "card", "key")
    """What is taken out of them."""
    patterns: tuple[str, ...] = ()
    """Regular expressions (Python's) of what is taken out besides. Keep them linear."""
    keep_days: float = Field(7, gt=0)
    """Until a record is deleted; whole hours, rounded down."""

    @field_validator("patterns")
    @classmethod
    def _patterns_compile(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
        return patterns


class GuardConfig(Spec):
    """Who may call an application, and how much at once. The defaults are closed."""

    keys: Literal["required", "none"] = "required"
    """`none` lets everyone in who reaches the port; the bounds below hold all the same."""
    default_limits: Limits = Limits()
    """For each thing that a key itself does not limit."""
    max_requests_in_flight: int | None = Field(None, ge=1)
    """Of one replica of the ingress, running and waiting; one more is refused at once. None is
    twice what the replica's engine runs at once, and 512 where there is no engine."""
    max_body_bytes: int = Field(4 * 2**20, ge=1)
    max_prompt_chars: int = Field(1_000_000, ge=1)
    """Over all prompts of one request."""
    max_prompts: int = Field(64, ge=1)
    """Prompts, inputs or documents of one request."""
    max_choices: int = Field(16, ge=1)
    """Largest `n` or `best_of`."""
    max_media: int = Field(16, ge=0)
    """Pictures, sounds and videos of one request."""
    media_tokens: int = Field(1000, ge=0)
    """What is reserved of a key's limits for each of them, until the engine has counted."""
    body_timeout_s: float = Field(30, gt=0)
    """Longest time that a client may take to send its request."""
    request_timeout_s: float = Field(600, gt=0)
    """Longest time from the request to the last byte of its answer."""
    replace_slow_replicas: bool = True
    """Whether a replica that is far slower than the others for 20 s is replaced."""
    tracing: str | None = Field(None, pattern=r"^https?://\S+$")
    """Base URL of an OTLP collector (HTTP) for traces; None: where OTEL_EXPORTER_OTLP_ENDPOINT
    says, and without that there are none."""
    prices: dict[str, Price] = Field(default_factory=dict)
    """Model → price, noted with each use; a model without one costs nothing."""
    chat_page: bool = False
    """Whether `GET /chat` has a page to try the models with; it asks for a key as well."""
    cache: CacheConfig | None = None
    """None keeps no answers."""
    log_prompts: PromptLogConfig | None = None
    """None writes nothing down of what is asked and answered."""

    @model_validator(mode="after")
    def _cache_needs_keys(self) -> GuardConfig:
        if self.cache and self.keys == "none":
            raise ValueError("`cache` keeps answers per key and needs `keys: required`")
        return self
