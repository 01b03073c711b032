"""The model card: a Hugging Face README.md that says where a model comes from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import yaml

from manta.spec import EvaluateConfig
from manta.workloads import code

if TYPE_CHECKING:
    from manta.workloads.evaluate import Evaluation

_TEMPLATE = """\
---
{front_matter}---

# {name}

A causal language model, trained with Manta.

## Scores

Bits for each UTF-8 byte of held-out text (lower is better): {num_documents} whole documents,
{num_bytes:,} bytes, {num_tokens:,} tokens of dataset `{dataset}`, version `{version}`.

| method | bits per byte |
| --- | --- |
{rows}

The model saw windows of at most {window} tokens; after a document's first window, each scores
{stride} new ones, so that every byte counts exactly once. Document ends are not scored. The
unigram model draws each token by its count in the training text plus one. xz has not seen the
training text; its stream has no checksum.

## Intended use

{intended_use}

## Limits

Trained on one dataset, without instruction tuning or safety training. It may repeat its training
text word for word, and what it writes may be wrong. The scores hold for text like the held-out
documents, and say nothing about other text or about following instructions.

## Origin

| | |
| --- | --- |
| training data | `{trained_on}`, version `{trained_version}` |
| parent model | {parent} |
| training code | `{code_version}` |
| evaluation code | `{evaluation_version}` |

Training configuration:

```yaml
{config}```
"""


def model_card(config: EvaluateConfig, seal: dict[str, Any], evaluation: Evaluation) -> str:
    """The card as Markdown; `seal` holds the facts that training recorded."""
    trained_on = seal.get("dataset") or {}
    front_matter = {"tags": ["manta"], "pipeline_tag": "text-generation"}
    return _TEMPLATE.format(
        front_matter=yaml.safe_dump(front_matter),
        name=config.model,
        num_documents=evaluation.num_documents,
        num_bytes=evaluation.num_bytes,
        num_tokens=evaluation.num_tokens,
        dataset=evaluation.dataset,
        version=evaluation.dataset_version,
        rows="\n".join(f"| {name} | {value:.3f} |" for name, value in evaluation.table),
        window=evaluation.window_tokens,
        stride=evaluation.stride_tokens,
        intended_use=config.intended_use,
        trained_on=trained_on.get("reference", "unknown"),
        trained_version=trained_on.get("version", "unknown"),
        parent=seal.get("parent") or "none, trained from random weights",
        code_version=seal.get("code_version", "unknown"),
        evaluation_version=code.version(),
        config=yaml.safe_dump(seal.get("config") or {}, sort_keys=False),
    )
