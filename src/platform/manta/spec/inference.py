"""What `jobs/evaluate.py`, `jobs/generate.py` and `jobs/ask.py` read."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from manta.spec.data import Name
from manta.spec.loading import Spec


class EvaluateConfig(Spec):
    """Score an exported model on a dataset's held-out text."""

    model: Name
    dataset: str
    max_bytes: int = Field(400_000, ge=1)
    """Held-out UTF-8 text to score, at most; whole documents, in a fixed order."""
    batch_size: int = Field(8, ge=1)
    intended_use: str = "Trying out the platform; not for production."


class SamplingConfig(Spec):
    """How to decode; names as in vLLM's SamplingParams."""

    max_tokens: int = Field(64, ge=1)
    temperature: float = Field(0.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = 0


class GenerateConfig(Spec):
    """Complete many prompts with vLLM under Ray Data; finished shards are never redone."""

    name: Name
    model: str
    """Name of an exported model, or an fsspec URL of a Hugging Face folder."""
    prompts: str
    """fsspec URL or glob of JSONL or Parquet files."""
    prompt_field: str = "prompt"
    rows_per_shard: int = Field(64, ge=1)
    """Rows that are written, and survive a crash, together."""
    concurrency: int = Field(1, ge=1)
    """vLLM engines."""
    batch_size: int = Field(32, ge=1)
    sampling: SamplingConfig = SamplingConfig()
    accelerator_type: str | None = None
    """Ray's accelerator name, e.g. `L4`; None runs on CPU."""
    engine_kwargs_passthrough: dict[str, Any] = Field(default_factory=dict)
    """vLLM's own engine arguments."""


class AskConfig(Spec):
    """Ask a running OpenAI-compatible endpoint, streaming."""

    model: str
    prompts: tuple[str, ...] = Field(min_length=1)
    url: str | None = None
    """Base URL, e.g. http://127.0.0.1:8000/v1; None takes the cluster's own endpoint."""
    max_tokens: int = Field(48, ge=1)
    temperature: float = Field(0.0, ge=0)
    timeout_s: float = Field(60, gt=0)
