"""Bits per byte: how short a text becomes under a model, and under what it is compared with.

A model that gives token i the probability p_i can, with an arithmetic coder, write a text in
-Σ log2 p_i bits. Divided by the text's UTF-8 bytes this does not depend on the tokenizer, so
models with different ones, and plain compressors, can be compared.
"""

from __future__ import annotations

import lzma
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Window:
    """Input positions [start, end) of a sequence; the last `num_scored` predictions count."""

    start: int
    end: int
    num_scored: int


def windows(num_tokens: int, length: int, stride: int) -> list[Window]:
    """Windows over a start token and `num_tokens` tokens that score each token exactly once.

    Args:
        num_tokens: tokens to predict; position 0 of the sequence is a start token, not scored.
        length: inputs that the model sees at once, at most.
        stride: tokens that each window after the first scores; the rest of it is context.
    """
    assert 0 < stride <= length
    found = []
    scored = 0
    while scored < num_tokens:
        num_new = min(length if scored == 0 else stride, num_tokens - scored)
        scored += num_new
        found.append(Window(max(0, scored - length), scored, num_new))
    return found


def model_bits(
    model: torch.nn.Module,
    documents: Sequence[Sequence[int]],
    *,
    start_token: int,
    length: int,
    stride: int,
    batch_size: int,
) -> list[float]:
    """Bits of each tokenized document under a causal language model of transformers."""
    import torch

    device = next(model.parameters()).device
    bits = [0.0] * len(documents)
    tasks = [
        (number, window)
        for number, tokens in enumerate(documents)
        for window in windows(len(tokens), length, stride)
    ]
    tasks.sort(key=lambda task: task[1].end - task[1].start)  # like lengths: little padding
    for first in range(0, len(tasks), batch_size):
        batch = tasks[first : first + batch_size]
        with torch.inference_mode():
            nats = _batch_nats(model, documents, batch, start_token, device)
        for (number, _), value in zip(batch, nats, strict=True):
            bits[number] += value / math.log(2)
    return bits


def _batch_nats(
    model: torch.nn.Module,
    documents: Sequence[Sequence[int]],
    batch: list[tuple[int, Window]],
    start_token: int,
    device: torch.device,
) -> list[float]:
    import torch

    width = max(window.end - window.start for _, window in batch)
    inputs = torch.zeros(len(batch), width, dtype=torch.long)
    targets = torch.full((len(batch), width), -1)
    for row, (number, window) in enumerate(batch):
        sequence = [start_token, *documents[number]][window.start : window.end + 1]
        size = window.end - window.start
        inputs[row, :size] = torch.tensor(sequence[:-1])
        first = size - window.num_scored
        targets[row, first:size] = torch.tensor(sequence[1 + first :])
    # Padding is on the right, where a causal model's earlier positions cannot see it.
    logits = model(input_ids=inputs.to(device)).logits
    scored = (targets >= 0).to(device)
    # Flat and only what counts: cross_entropy over a transposed batch is several times slower.
    losses = torch.nn.functional.cross_entropy(
        logits[scored].float(), targets.to(device)[scored], reduction="none"
    )
    rows = losses.double().split([window.num_scored for _, window in batch])
    return [float(row.sum()) for row in rows]


def unigram_bits(documents: Iterable[Sequence[int]], counts: Sequence[int]) -> float:
    """Bits of the documents when each token is drawn by its training count, plus one."""
    total = sum(counts) + len(counts)
    cost = [math.log2(total) - math.log2(count + 1) for count in counts]
    return math.fsum(cost[token] for tokens in documents for token in tokens)


def xz_bits(data: bytes) -> int:
    """Bits of one xz stream, preset 9 extreme, without a checksum."""
    packed = lzma.compress(data, check=lzma.CHECK_NONE, preset=9 | lzma.PRESET_EXTREME)
    return 8 * len(packed)
