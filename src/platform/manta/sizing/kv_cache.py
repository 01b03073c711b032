"""How much KV cache a sequence takes on one accelerator, by vLLM's own rules.

Source: vLLM 0.29, v1/kv_cache_interface.py (blocks of a layer) and v1/core/kv_cache_utils.py
(groups of layers that share a pool). An integration test compares the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from manta.sizing.model import Model


@dataclass(frozen=True, kw_only=True)
class CacheSettings:
    """What of the engine's settings decides the size of the cache."""

    max_model_len: int
    """Tokens of the longest sequence, prompt and answer together."""
    dtype_bytes: int
    block_size: int
    tensor_parallel: int = 1
    context_parallel: int = 1
    """Ranks over which one sequence's cache is spread (`decode_context_parallel_size`)."""
    tokens_in_flight: int = 8192
    """Tokens scheduled and not settled: sliding windows keep that much more."""


@dataclass(frozen=True, kw_only=True)
class Cache:
    """The layers of one pipeline stage on one accelerator."""

    pool_block_bytes: int
    """What one block of the shared pool takes."""
    blocks_per_sequence: int
    """Of a sequence of the full length."""
    bytes_per_token: int
    """While no window has slid yet."""

    @property
    def bytes_per_sequence(self) -> int:
        """Of one sequence of the full length."""
        return self.blocks_per_sequence * self.pool_block_bytes

    def num_sequences(self, num_bytes: float) -> int:
        """How many sequences of the full length `num_bytes` hold."""
        return max(0, int(num_bytes) // self.pool_block_bytes) // self.blocks_per_sequence

    def num_tokens(self, num_bytes: float, max_model_len: int) -> int:
        """What vLLM calls the size of the cache: that of the sequences it holds, in tokens."""
        blocks = max(0, int(num_bytes) // self.pool_block_bytes)
        return int(blocks / self.blocks_per_sequence * max_model_len)


def layer_bytes_per_token(model: Model, settings: CacheSettings) -> int:
    """Keys and values of one token in one layer, on one accelerator."""
    if model.latent:  # not divided: each rank keeps it whole
        return (model.latent.kv_rank + model.latent.rope_dim) * settings.dtype_bytes
    heads = max(1, model.num_kv_heads // settings.tensor_parallel)
    return 2 * heads * model.head_dim * settings.dtype_bytes


def cache_of(model: Model, layers: Sequence[int], settings: CacheSettings) -> Cache:
    """The KV cache of these layers."""
    page = layer_bytes_per_token(model, settings) * settings.block_size
    full = [layer for layer in layers if model.window(layer) is None]
    window = next((w for w in map(model.window, layers) if w is not None), None)
    counts = [n for n in (len(full), len(layers) - len(full)) if n]
    group = _group_size(counts)
    blocks = _ceil(len(full), group) * _full_blocks(settings)
    if window is not None:
        blocks += _ceil(len(layers) - len(full), group) * _window_blocks(window, settings)
    return Cache(
        pool_block_bytes=group * page,
        blocks_per_sequence=max(1, blocks),
        bytes_per_token=len(layers) * page // settings.block_size,
    )


def _group_size(counts: Sequence[int]) -> int:
    """Layers of one group: the fewest of a kind, unless padding up to the most is cheap."""
    low, high = min(counts), max(counts)
    return high if high < low * 1.5 else low


def _full_blocks(settings: CacheSettings) -> int:
    return _ceil(_ceil(settings.max_model_len, settings.context_parallel), settings.block_size)


def _window_blocks(window: int, settings: CacheSettings) -> int:
    held = min(window - 1 + settings.tokens_in_flight, settings.max_model_len)
    return _ceil(held, settings.block_size) + 1


def stages(num_layers: int, pipeline_parallel: int) -> tuple[range, ...]:
    """The layers of each pipeline stage, as vLLM divides them (distributed/utils.py)."""
    sizes = [num_layers // pipeline_parallel] * pipeline_parallel
    for i in range(2, num_layers % pipeline_parallel + 2):
        sizes[-i] += 1
    starts = [sum(sizes[:i]) for i in range(pipeline_parallel)]
    return tuple(range(s, s + n) for s, n in zip(starts, sizes, strict=True))


def _ceil(number: int, by: int) -> int:
    return -(-number // by)
