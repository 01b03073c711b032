"""Does it fit? Weights, KV cache and allowances against the memory of one accelerator.

What vLLM needs beside weights and cache it measures at its start. Here it is an allowance, held
against published logs (tests/unit/test_sizing_logs.py). Each says where it comes from.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from manta.sizing.accelerators import GIB, Accelerator
from manta.sizing.engine import (
    Engine,
    block_size,
    cache_dtype_bytes,
    default_batch,
    weights_dtype,
)
from manta.sizing.kv_cache import Cache, CacheSettings, cache_of, layer_bytes_per_token, stages
from manta.sizing.model import DTYPE_BYTES, Model, NotKnown
from manta.sizing.quantization import FP8
from manta.sizing.weights import (
    Weight,
    embedding_weights,
    head_weights,
    layer_weights,
    num_active_parameters,
    num_bytes,
    num_parameters,
)

SAMPLER_BYTES_PER_LOGIT = 40
"""Peak of vLLM's trial run of its sampler, for each sequence and entry of the vocabulary: logits
in 32 bits, sorted with their indices, softmax, cumulated sums. 38 to 41 in three logs: vLLM pull
requests 10511 (Llama 3 8B) and 17122 (Llama 3.1 8B), issue 12529 (Qwen2.5 1.5B)."""
CUDA_GRAPH_BYTES = int(0.75 * GIB)
"""vLLM's own estimates: 0.36 GiB (gpustack/runner 251), 0.73 GiB (vLLM pull request 39559)."""
OUTSIDE_TORCH_BYTES = (GIB // 2, 2 * GIB)
"""CUDA, cuBLAS, NCCL, below and from 40 GiB of memory. Seen: 0.04 to 0.39 GiB (vLLM issues 12529,
11251, pull request 14447) and 1.27 to 1.79 GiB (pull requests 11743, 10511)."""
_LARGE_BYTES = 40 * GIB
_NOT_IN_FLOAT16 = ("gemma2", "gemma3_text")
"""Source: vLLM 0.29, config/model.py; without bfloat16 it keeps them in 32 bits."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """One engine on its accelerators; all bytes are of the fullest one."""

    engine: Engine
    accelerator: Accelerator | None
    """None: a CPU."""
    num_parameters: int
    num_active_parameters: int
    max_model_len: int
    max_num_seqs: int
    memory_bytes: int | None
    """What the engine may take; None where it takes what it needs (CPU)."""
    weights_bytes: int
    allowance_bytes: int
    cache_bytes: int
    """Left, or set, for the KV cache; below 0 where the rest alone is too much."""
    cache: Cache
    decode_s_per_token: float | None = None
    """Least time between two tokens of a lone, short sequence; None without a known bandwidth."""
    full_decode_s_per_token: float | None = None
    """The same with as many sequences as asked for and held, each of the full length."""

    @property
    def num_sequences(self) -> int:
        """Sequences of the full length that the cache holds at once."""
        return self.cache.num_sequences(self.cache_bytes)

    @property
    def num_cache_tokens(self) -> int:
        """Tokens that the cache holds, in sequences of the full length."""
        return self.cache.num_tokens(self.cache_bytes, self.max_model_len)

    @property
    def starts(self) -> bool:
        """vLLM refuses to start if one sequence of the full length does not fit."""
        return self.num_sequences >= 1

    @property
    def wanted_sequences(self) -> int:
        """What the file asks for; 1 if it does not say."""
        return self.engine.max_num_seqs or 1

    @property
    def holds_all(self) -> bool:
        """Whether every sequence that the file allows at once may have the full length."""
        return self.num_sequences >= self.wanted_sequences

    @property
    def short_bytes(self) -> int:
        """What one sequence of the full length lacks on each accelerator; 0 if it fits."""
        return max(0, self.cache.bytes_per_sequence - self.cache_bytes)

    @property
    def num_together(self) -> int:
        """Sequences of the full length in `full_decode_s_per_token`."""
        return max(1, min(self.max_num_seqs, self.num_sequences))


def fit(model: Model, engine: Engine, accelerator: Accelerator | None) -> Fit:
    """Arithmetic for the fullest accelerator of a replica.

    Raises:
        NotKnown: a type, a quantisation or a length does not follow from the facts.
    """
    sized = _quantised(model, engine)
    _divides(sized, engine)
    if accelerator is not None and not accelerator.has_bfloat16:
        _does_without_bfloat16(sized, engine, accelerator)
    settings = _settings(sized, engine, accelerator)
    found = _at_rest(sized, engine, accelerator, settings)
    if accelerator is None:
        return found
    together, length = found.num_together, found.max_model_len
    return replace(
        found,
        decode_s_per_token=_decode_s(sized, engine, settings, accelerator, 1, 0),
        full_decode_s_per_token=_decode_s(sized, engine, settings, accelerator, together, length),
    )


def certainly_too_much(model: Model, engine: Engine, accelerator: Accelerator) -> int:
    """Bytes that one accelerator lacks even without any allowance; 0 if it may do.

    Raises NotKnown as `fit` does.
    """
    found = fit(model, engine, accelerator)
    if engine.not_counted:
        return 0  # e.g. weights that lie in the memory of the host
    if engine.cache_bytes_are_set:
        return max(0, found.cache.bytes_per_sequence - found.cache_bytes)
    generous = int(accelerator.memory_bytes * engine.gpu_memory_utilization)
    return max(0, found.weights_bytes + found.cache.bytes_per_sequence - generous)


def _settings(model: Model, engine: Engine, accelerator: Accelerator | None) -> CacheSettings:
    batched, _ = _batch(engine, accelerator)
    return CacheSettings(
        max_model_len=engine.max_model_len or model.max_position_embeddings,
        dtype_bytes=cache_dtype_bytes(engine, model),
        block_size=block_size(engine, model),
        tensor_parallel=engine.tensor_parallel,
        context_parallel=engine.context_parallel,
        tokens_in_flight=_batches_at_once(engine) * batched,
    )


def _at_rest(
    model: Model, engine: Engine, accelerator: Accelerator | None, settings: CacheSettings
) -> Fit:
    """All but the time of a token."""
    limit = _limit(engine, accelerator)
    if limit is None and not engine.cache_bytes_are_set:
        raise NotKnown("on a CPU vLLM sizes its cache by the machine; set VLLM_CPU_KVCACHE_SPACE")
    batched, seqs = _batch(engine, accelerator)
    allowance = _allowance(model, engine, accelerator, batched, seqs)

    def left(weights: int) -> int:
        if engine.cache_bytes_are_set or limit is None:
            return engine.kv_cache_bytes or 0
        return limit - weights - allowance

    parts = [
        (_stage_bytes(model, engine, layers), cache_of(model, layers, settings))
        for layers in stages(model.num_layers, engine.pipeline_parallel)
    ]
    weights, cache = min(parts, key=lambda part: left(part[0]) / part[1].pool_block_bytes)
    return Fit(
        engine=engine,
        accelerator=accelerator,
        num_parameters=num_parameters(model),
        num_active_parameters=num_active_parameters(model),
        max_model_len=settings.max_model_len,
        max_num_seqs=seqs,
        memory_bytes=limit,
        weights_bytes=weights,
        allowance_bytes=allowance,
        cache_bytes=left(weights),
        cache=cache,
    )


def _divides(model: Model, engine: Engine) -> None:
    """Raise NotKnown where vLLM refuses to cut the model in so many parts."""
    parts = engine.tensor_parallel
    if engine.pipeline_parallel > model.num_layers:
        raise NotKnown(f"there are but {model.num_layers} layers for pipeline_parallel_size")
    if model.num_heads % parts:
        raise NotKnown(f"vLLM cannot divide {model.num_heads} attention heads by {parts}")
    if model.experts and model.quantization and not engine.expert_parallel:
        size, block = model.experts.intermediate_size, model.quantization.block_size
        if size % (parts * block):
            raise NotKnown(
                f"vLLM cannot cut experts of {size} in {parts} between blocks of {block}; "
                "write `enable_expert_parallel: true`"
            )


def _does_without_bfloat16(model: Model, engine: Engine, accelerator: Accelerator) -> None:
    """Raise NotKnown where vLLM refuses, or falls back to a type of another size."""
    if weights_dtype(engine, model) != "bfloat16":
        return
    if engine.dtype == "bfloat16":
        raise NotKnown(f"{accelerator.name} has no bfloat16; write `dtype: float16`")
    if model.architecture in _NOT_IN_FLOAT16:
        raise NotKnown(f"{accelerator.name} has no bfloat16, {model.architecture} needs it")


def _quantised(model: Model, engine: Engine) -> Model:
    given = engine.quantization
    if given is None or model.quantization:
        return model
    if given == "fp8":
        return replace(model, quantization=FP8)
    raise NotKnown(f"what `quantization: {given}` makes of the weights is not known here")


def _batch(engine: Engine, accelerator: Accelerator | None) -> tuple[int, int]:
    """Tokens and sequences of one step at most."""
    memory = accelerator.usable_bytes if accelerator else 0
    name = accelerator.name if accelerator else None
    batched, seqs = default_batch(memory, name, engine.num_accelerators)
    seqs = engine.max_num_seqs or seqs
    return engine.max_num_batched_tokens or max(batched, seqs), seqs


def _batches_at_once(engine: Engine) -> int:
    """vLLM's `max_concurrent_batches`: scheduling is asynchronous on GPUs, not on CPUs."""
    return engine.pipeline_parallel + (0 if engine.accelerator is None else 1)


def _limit(engine: Engine, accelerator: Accelerator | None) -> int | None:
    if accelerator is None:
        return None
    return int(accelerator.usable_bytes * engine.gpu_memory_utilization)


def _allowance(
    model: Model, engine: Engine, accelerator: Accelerator | None, batched: int, seqs: int
) -> int:
    """What is neither weights nor cache: the peak of a step, CUDA graphs, libraries."""
    sampler = SAMPLER_BYTES_PER_LOGIT * min(seqs, batched) * model.vocab_size
    peak = max(sampler, _step_bytes(model, engine, batched))
    if accelerator is None:
        return peak
    graphs = 0 if engine.is_eager else CUDA_GRAPH_BYTES
    return peak + graphs + OUTSIDE_TORCH_BYTES[accelerator.memory_bytes >= _LARGE_BYTES]


def _step_bytes(model: Model, engine: Engine, batched: int) -> int:
    """The widest intermediate results of one layer that are alive together."""
    width = 3 * -(-model.intermediate_size // engine.tensor_parallel)
    if model.experts:
        chosen = model.experts.per_token
        inner = -(-model.experts.intermediate_size // engine.tensor_parallel)
        # vLLM's fused experts: one buffer in and out of the experts, one for the activation.
        width = max(width, chosen * (max(2 * inner, model.hidden_size) + inner))
    size = DTYPE_BYTES[weights_dtype(engine, model)]
    return batched * (4 * model.hidden_size + width) * size


def _stage_bytes(model: Model, engine: Engine, layers: range) -> int:
    """Weights of one pipeline stage on one accelerator."""
    weights = [weight for layer in layers for weight in layer_weights(model, layer)]
    is_first, is_last = layers.start == 0, layers.stop == model.num_layers
    if is_first or (is_last and model.ties_embeddings):
        weights.append(embedding_weights(model))
    if is_last:
        norm, head = head_weights(model)
        weights += [norm] if model.ties_embeddings else [norm, head]
    return _bytes(weights, model, engine) + _absorbed_bytes(model, engine) * len(layers)


def _absorbed_bytes(model: Model, engine: Engine) -> int:
    """vLLM's second copy, in 16 bits, of the projection out of the compressed keys and values."""
    if model.latent is None:
        return 0
    spread = model.num_heads * (model.latent.nope_dim + model.latent.value_dim)
    return 2 * model.latent.kv_rank * spread // engine.tensor_parallel


def _bytes(weights: list[Weight], model: Model, engine: Engine) -> int:
    return num_bytes(
        weights,
        model,
        dtype=weights_dtype(engine, model),
        tensor_parallel=engine.tensor_parallel,
        expert_parallel=engine.num_expert_ranks,
    )


def _decode_s(
    model: Model,
    engine: Engine,
    settings: CacheSettings,
    accelerator: Accelerator,
    num_sequences: int,
    length: int,
) -> float:
    """Seconds to read what one token of each sequence needs, once, through all stages.

    A layer's window bounds what is read of its cache. Of the experts each token reads its own;
    for several, those that evenly drawn choices are expected to name.
    """
    read = 0.0
    per_token = layer_bytes_per_token(model, settings) / engine.context_parallel
    for layer in range(model.num_layers):
        for weight in layer_weights(model, layer):
            size = _bytes([weight], model, engine)
            read += size * _share_read(model, weight, num_sequences)
        held = min(length, model.window(layer) or length)
        read += num_sequences * held * per_token
    head = [embedding_weights(model)] if model.ties_embeddings else list(head_weights(model))
    return (read + _bytes(head, model, engine)) / accelerator.bytes_per_s


def _share_read(model: Model, weight: Weight, num_sequences: int) -> float:
    if weight.split != "experts" or model.experts is None:
        return 1.0
    chosen = model.experts.per_token / model.experts.num
    return 1 - (1 - chosen) ** num_sequences
