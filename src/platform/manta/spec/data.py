"""What `jobs/prepare.py` reads: text in, a packed and versioned dataset out."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from manta.spec.loading import Spec

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]
"""A name that can be a folder, a Ray submission id and a URL part."""

STDLIB = "python-stdlib"


class TokenizerConfig(Spec):
    """A byte-level BPE tokenizer, trained on the training documents or loaded."""

    vocab_size: int = Field(4096, ge=300, le=262_144)
    load: str | None = None
    """URL of a folder with tokenizer.json, instead of training one."""
    train_max_bytes: int = Field(16_000_000, ge=1)
    """Text that the trainer sees, at most; the merges hardly change beyond some tens of MB."""
    loose_space_rate: float = Field(0.05, ge=0, le=1)
    """Share of the training text's words whose leading space is a token of its own, as it is at
    the end of a prompt such as `def `."""


class PrepareConfig(Spec):
    """Parameters of a dataset. All of them enter its version, except `name`."""

    name: Name
    inputs: tuple[str, ...] = Field((STDLIB,), min_length=1)
    """fsspec URLs or globs, or `python-stdlib`: the source of the running Python's library."""
    format: Literal["auto", "text", "jsonl", "parquet"] = "auto"
    """`auto` goes by the file's extension; what is neither JSONL nor Parquet is text."""
    text_field: str = "text"
    """Column or key that holds the text, in JSONL and Parquet."""
    min_document_chars: int = Field(64, ge=1)
    max_document_chars: int = Field(1_000_000, ge=1)
    """Longer documents are cut into pieces of this length, each a document."""
    max_documents: int | None = Field(None, ge=2)
    """Take only this many documents, the first by content hash; None takes all."""
    validation_fraction: float = Field(0.05, gt=0, lt=1)
    sequence_length: int = Field(256, ge=8)
    """Tokens a block."""
    tokenizer: TokenizerConfig = TokenizerConfig()
