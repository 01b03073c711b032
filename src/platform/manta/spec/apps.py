"""Arguments of the applications in `serve_apps/` that are not language models alone."""

from __future__ import annotations

from pydantic import Field

from manta.spec.guard import GuardConfig
from manta.spec.loading import Spec


class EmbedderConfig(Spec):
    """A text embedding model, and how requests are batched for it."""

    model_id: str = "ngrams"
    """Name that clients call it by."""
    num_dimensions: int = Field(256, ge=8, le=4096)
    num_buckets: int = Field(65536, ge=1024, le=2**22)
    """Rows of its table; n-grams that fall into one row cannot be told apart."""
    seed: int = 0
    """Of its weights: replicas with the same one agree."""
    max_batch_size: int = Field(32, ge=1)
    """Requests that share a pass through the model."""
    batch_wait_s: float = Field(0.005, ge=0)
    """Longest time that the first request of a batch waits for others."""


class EmbeddingsArgs(EmbedderConfig):
    """`args` of `manta.serving.embeddings:build_app`."""

    guard: GuardConfig = GuardConfig()


class Generator(Spec):
    """The OpenAI-compatible endpoint that writes the answers."""

    url: str = "http://127.0.0.1:8000/v1"
    model: str = "quickstart"
    api_key_file: str | None = None
    """None: `$OPENAI_API_KEY`, else the owner's key beside the cluster's token."""
    timeout_s: float = Field(120, gt=0)
    """Longest silence."""


class RagArgs(Spec):
    """`args` of `manta.serving.rag:build_app`."""

    guard: GuardConfig = GuardConfig()
    model_id: str = "rag"
    documents: str = "documents"
    """Folder of .md and .txt files: a URL, or a path under the storage root."""
    num_passages: int = Field(3, ge=1, le=50)
    """Given to the generator with each question."""
    passage_chars: int = Field(600, ge=50, le=20_000)
    """Longest passage; documents are cut at paragraphs."""
    embedder: EmbedderConfig = EmbedderConfig()
    generator: Generator = Generator()
