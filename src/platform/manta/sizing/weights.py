"""The tensors of a model: how many numbers, and which part of them one accelerator holds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from manta.sizing.model import DTYPE_BYTES, Model

VOCAB_PADDING = 64
"""vLLM rounds the vocabulary up to this before it divides it (vocab_parallel_embedding.py)."""


@dataclass(frozen=True, kw_only=True)
class Weight:
    """Tensors of one layer that are divided and quantised alike."""

    num: int
    split: Literal["whole", "tensor", "kv", "vocab", "experts"] = "whole"
    """Over what it is divided: nothing, tensor parallel ranks, those but never less than one
    key/value head, the same after padding, or experts."""
    is_linear: bool = False
    """Quantised, where the model is."""
    is_table: bool = False
    """One row of it is read for each token, not all."""


def layer_weights(model: Model, layer: int) -> Iterator[Weight]:
    """Everything in one decoder layer."""
    yield Weight(num=model.norms_per_layer * model.hidden_size)
    yield from _latent_attention(model) if model.latent else _attention(model)
    experts = model.experts
    if experts is None or layer not in experts.layers:
        yield from _mlp(model, model.intermediate_size)
        return
    each = 3 * model.hidden_size * experts.intermediate_size
    yield Weight(num=experts.num * each, split="experts", is_linear=True)
    yield Weight(num=experts.num * (model.hidden_size + int(experts.has_score_bias)))
    if experts.shared_size:
        yield from _mlp(model, experts.shared_size)
    if experts.has_shared_gate:
        yield Weight(num=model.hidden_size)


def _attention(model: Model) -> Iterator[Weight]:
    hidden, dim = model.hidden_size, model.head_dim
    queries, keys = model.num_heads * dim, 2 * model.num_kv_heads * dim
    yield Weight(num=hidden * queries, split="tensor", is_linear=True)
    yield Weight(num=hidden * keys, split="kv", is_linear=True)
    yield Weight(num=queries * hidden, split="tensor", is_linear=True)
    if model.has_qkv_bias:
        yield Weight(num=queries, split="tensor")
        yield Weight(num=keys, split="kv")
    if model.has_output_bias:
        yield Weight(num=hidden)
    if model.has_qk_norm:
        yield Weight(num=2 * dim)


def _latent_attention(model: Model) -> Iterator[Weight]:
    latent, hidden, heads = model.latent, model.hidden_size, model.num_heads
    assert latent is not None
    query_dim = latent.nope_dim + latent.rope_dim
    if latent.q_rank is None:
        yield Weight(num=hidden * heads * query_dim, split="tensor", is_linear=True)
    else:
        yield Weight(num=hidden * latent.q_rank, is_linear=True)
        yield Weight(num=latent.q_rank)
        yield Weight(num=latent.q_rank * heads * query_dim, split="tensor", is_linear=True)
    yield Weight(num=hidden * (latent.kv_rank + latent.rope_dim), is_linear=True)
    yield Weight(num=latent.kv_rank)
    spread = heads * (latent.nope_dim + latent.value_dim)
    yield Weight(num=latent.kv_rank * spread, split="tensor", is_linear=True)
    yield Weight(num=heads * latent.value_dim * hidden, split="tensor", is_linear=True)


def _mlp(model: Model, intermediate_size: int) -> Iterator[Weight]:
    yield Weight(num=3 * model.hidden_size * intermediate_size, split="tensor", is_linear=True)
    if model.has_mlp_bias:
        yield Weight(num=2 * intermediate_size, split="tensor")
        yield Weight(num=model.hidden_size)


def embedding_weights(model: Model) -> Weight:
    """The table that tokens are looked up in."""
    return Weight(num=model.vocab_size * model.hidden_size, split="vocab", is_table=True)


def head_weights(model: Model) -> tuple[Weight, ...]:
    """The last norm, and the projection to the vocabulary: all of it is read for each token."""
    size = model.vocab_size * model.hidden_size
    return Weight(num=model.hidden_size), Weight(num=size, split="vocab")


def num_parameters(model: Model) -> int:
    """All parameters, as `model.num_parameters()` of transformers counts them."""
    head = model.hidden_size if model.ties_embeddings else sum(w.num for w in head_weights(model))
    layers = sum(w.num for i in range(model.num_layers) for w in layer_weights(model, i))
    return embedding_weights(model).num + layers + head


def num_active_parameters(model: Model) -> int:
    """Those that one token passes: of the experts only the chosen ones."""
    if model.experts is None:
        return num_parameters(model)
    each = 3 * model.hidden_size * model.experts.intermediate_size
    idle = (model.experts.num - model.experts.per_token) * each
    return num_parameters(model) - len(model.experts.layers) * idle


def num_on_one(weight: Weight, model: Model, tensor_parallel: int, expert_parallel: int) -> int:
    """How many numbers of `weight` lie on one of the accelerators of a pipeline stage.

    Experts are divided over `expert_parallel` accelerators as wholes; where that is 1, each is cut
    by tensor parallelism.
    """
    if weight.split == "whole":
        return weight.num
    if weight.split == "experts":
        assert model.experts is not None
        each = weight.num // model.experts.num
        if expert_parallel > 1:
            return _ceil(model.experts.num, expert_parallel) * each
        return model.experts.num * _ceil(each, tensor_parallel)
    if weight.split == "vocab":
        padded = _ceil(model.vocab_size, VOCAB_PADDING * tensor_parallel) * VOCAB_PADDING
        return padded * model.hidden_size
    if weight.split == "kv":
        heads = max(1, model.num_kv_heads // tensor_parallel)
        return weight.num * heads // model.num_kv_heads
    return _ceil(weight.num, tensor_parallel)


def num_bytes(
    weights: Iterable[Weight],
    model: Model,
    *,
    dtype: str,
    tensor_parallel: int,
    expert_parallel: int,
) -> int:
    """Bytes of `weights` on one accelerator."""
    plain = DTYPE_BYTES[dtype] * 8.0
    total = 0.0
    for weight in weights:
        quantised = model.quantization if weight.is_linear else None
        bits = quantised.bits_per_weight if quantised else plain
        total += num_on_one(weight, model, tensor_parallel, expert_parallel) * bits / 8
    return int(total)


def _ceil(number: int, by: int) -> int:
    return -(-number // by)
