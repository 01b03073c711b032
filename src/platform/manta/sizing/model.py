"""What a language model is made of, read from its `config.json` in the Hugging Face layout.

Only architectures whose parameters were compared with the real thing (transformers, on the `meta`
device) are known here. Of any other nothing is guessed: `NotKnown`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from manta.sizing.quantization import Quantization, quantization_of

DTYPE_BYTES: Mapping[str, int] = {
    "float32": 4,
    "float": 4,
    "bfloat16": 2,
    "float16": 2,
    "half": 2,
}


MAX_LAYERS = 10_000
"""A larger number would take time and memory to count with."""


class NotKnown(Exception):
    """What is asked for does not follow from the facts at hand; the message says why."""


@dataclass(frozen=True, kw_only=True)
class LatentAttention:
    """DeepSeek's multi-head latent attention: keys and values are kept compressed."""

    q_rank: int | None
    """None: queries are not compressed."""
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int


@dataclass(frozen=True, kw_only=True)
class Experts:
    """A mixture of experts in the layers named."""

    num: int
    per_token: int
    intermediate_size: int
    shared_size: int = 0
    """Intermediate size of the experts that every token passes, together."""
    has_shared_gate: bool = False
    has_score_bias: bool = False
    layers: frozenset[int] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Model:
    """Sizes of a decoder-only transformer."""

    architecture: str
    hidden_size: int
    num_layers: int
    vocab_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    ties_embeddings: bool
    max_position_embeddings: int
    dtype: str
    """Of the checkpoint; quantised weights aside."""
    has_qkv_bias: bool = False
    has_output_bias: bool = False
    has_mlp_bias: bool = False
    has_qk_norm: bool = False
    norms_per_layer: int = 2
    latent: LatentAttention | None = None
    experts: Experts | None = None
    windows: tuple[int | None, ...] = ()
    """Of each layer: how many tokens it attends to; None is all."""
    quantization: Quantization | None = None

    def window(self, layer: int) -> int | None:
        """Tokens that a layer attends to; None is all."""
        return self.windows[layer] if self.windows else None


@dataclass(frozen=True, kw_only=True)
class _Family:
    """How an architecture reads its config, where that is not written in the config."""

    qkv_bias: bool | Literal["attention_bias"] = False
    output_bias: bool | Literal["attention_bias"] = False
    mlp_bias: bool | Literal["mlp_bias"] = False
    qk_norm: bool = False
    norms_per_layer: int = 2
    ties_embeddings: bool = False
    head_dim: int | None = None
    """Where the config leaves it out; None is hidden_size / heads."""
    kv_heads: int | None = None
    window: int | None = None


_FAMILIES: Mapping[str, _Family] = {
    "llama": _Family(qkv_bias="attention_bias", output_bias="attention_bias", mlp_bias="mlp_bias"),
    "mistral": _Family(kv_heads=8, window=4096),
    "mixtral": _Family(kv_heads=8),
    "phi3": _Family(),
    "qwen2": _Family(qkv_bias=True),
    "qwen2_moe": _Family(qkv_bias=True),
    "qwen3": _Family(
        qkv_bias="attention_bias", output_bias="attention_bias", qk_norm=True, head_dim=128
    ),
    "qwen3_moe": _Family(
        qkv_bias="attention_bias", output_bias="attention_bias", qk_norm=True, head_dim=128
    ),
    "gemma2": _Family(norms_per_layer=4, ties_embeddings=True, head_dim=256),
    "gemma3_text": _Family(norms_per_layer=4, ties_embeddings=True, head_dim=256, qk_norm=True),
    "deepseek_v2": _Family(),
    "deepseek_v3": _Family(),
}
"""`model_type` → what its class in transformers (5.x) assumes."""

ARCHITECTURES = tuple(sorted(_FAMILIES))


def model_of(config: Mapping[str, Any]) -> Model:
    """Sizes from the content of a `config.json`.

    Raises:
        NotKnown: an architecture or a quantisation that is not known here, or a size is missing.
    """
    kind = str(config.get("model_type", ""))
    family = _FAMILIES.get(kind)
    if family is None:
        raise NotKnown(
            f"the sizes of architecture `{kind[:40] or '?'}` are not known "
            f"(known: {', '.join(ARCHITECTURES)})"
        )
    num_heads = _number(config, "num_attention_heads")
    num_layers = _number(config, "num_hidden_layers")
    if num_layers > MAX_LAYERS:
        raise NotKnown(f"{num_layers} layers are more than any model has")
    hidden_size = _number(config, "hidden_size")
    given_dim = config.get("head_dim") or family.head_dim
    return Model(
        architecture=kind,
        hidden_size=hidden_size,
        num_layers=num_layers,
        vocab_size=_number(config, "vocab_size"),
        num_heads=num_heads,
        num_kv_heads=_number(config, "num_key_value_heads", family.kv_heads or num_heads),
        head_dim=int(given_dim) if given_dim else hidden_size // num_heads,
        intermediate_size=_number(config, "intermediate_size"),
        ties_embeddings=bool(config.get("tie_word_embeddings", family.ties_embeddings)),
        max_position_embeddings=_number(config, "max_position_embeddings"),
        dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
        has_qkv_bias=_flag(config, family.qkv_bias),
        has_output_bias=_flag(config, family.output_bias),
        has_mlp_bias=_flag(config, family.mlp_bias),
        has_qk_norm=family.qk_norm,
        norms_per_layer=family.norms_per_layer,
        latent=_latent(config) if kind.startswith("deepseek") else None,
        experts=_experts(config, kind, num_layers),
        windows=_windows(config, kind, family, num_layers),
        quantization=_quantization(config),
    )


def _number(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 10**12:
        raise NotKnown(f"the model's config.json has no usable `{key}`")
    return value


def _first_key(config: Mapping[str, Any], key: str) -> str:
    """The key that holds the number of experts: transformers 5 writes its own name for all."""
    return key if key in config else "num_local_experts"


def _flag(config: Mapping[str, Any], given: bool | str) -> bool:
    return bool(config.get(given, False)) if isinstance(given, str) else given


def _latent(config: Mapping[str, Any]) -> LatentAttention:
    rank = config.get("q_lora_rank")
    return LatentAttention(
        q_rank=_number(config, "q_lora_rank") if rank is not None else None,
        kv_rank=_number(config, "kv_lora_rank"),
        nope_dim=_number(config, "qk_nope_head_dim"),
        rope_dim=_number(config, "qk_rope_head_dim"),
        value_dim=_number(config, "v_head_dim"),
    )


def _experts(config: Mapping[str, Any], kind: str, num_layers: int) -> Experts | None:
    if kind == "mixtral":
        return Experts(
            num=_number(config, "num_local_experts"),
            per_token=_number(config, "num_experts_per_tok"),
            intermediate_size=_number(config, "intermediate_size"),
            layers=frozenset(range(num_layers)),
        )
    if kind.startswith("deepseek"):
        size = _number(config, "moe_intermediate_size")
        first = int(config.get("first_k_dense_replace") or 0)
        return Experts(
            num=_number(config, _first_key(config, "n_routed_experts")),
            per_token=_number(config, "num_experts_per_tok"),
            intermediate_size=size,
            shared_size=size * int(config.get("n_shared_experts") or 0),
            has_score_bias=kind == "deepseek_v3",
            layers=frozenset(range(first, num_layers)),
        )
    if kind in ("qwen2_moe", "qwen3_moe"):
        step, dense = int(config.get("decoder_sparse_step") or 1), config.get("mlp_only_layers")
        has_shared = kind == "qwen2_moe"
        return Experts(
            num=_number(config, _first_key(config, "num_experts")),
            per_token=_number(config, "num_experts_per_tok"),
            intermediate_size=_number(config, "moe_intermediate_size"),
            shared_size=_number(config, "shared_expert_intermediate_size") if has_shared else 0,
            has_shared_gate=has_shared,
            layers=frozenset(
                i for i in range(num_layers) if i not in (dense or ()) and (i + 1) % step == 0
            ),
        )
    return None


def _windows(
    config: Mapping[str, Any], kind: str, family: _Family, num_layers: int
) -> tuple[int | None, ...]:
    window = config.get("sliding_window", family.window)
    if kind.startswith("qwen") and not config.get("use_sliding_window"):
        return ()
    if not isinstance(window, int) or isinstance(window, bool):
        return ()
    kinds = config.get("layer_types")
    if isinstance(kinds, list) and len(kinds) == num_layers:
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    if kind == "gemma2":
        return tuple(window if i % 2 == 0 else None for i in range(num_layers))
    if kind == "gemma3_text":
        pattern = int(config.get("sliding_window_pattern") or 6)
        return tuple(window if (i + 1) % pattern else None for i in range(num_layers))
    if kind.startswith("qwen"):
        full = int(config.get("max_window_layers") or 0)
        return tuple(None if i < full else window for i in range(num_layers))
    return (window,) * num_layers


def _quantization(config: Mapping[str, Any]) -> Quantization | None:
    given = config.get("quantization_config")
    if given is None:
        return None
    found = quantization_of(given) if isinstance(given, Mapping) else None
    if found is None:
        raise NotKnown("the quantisation in the model's config.json is not one that is known here")
    return found
