"""What a quantised checkpoint's weights weigh: bits per weight, scales included."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_KEPT = re.compile(r"(^|[.:*])(lm_head|embed_tokens|gate|router|[a-z_]*norm)\b[^/]*$")
"""Modules that are always counted as not quantised: leaving them out changes nothing."""


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """Applies to the linear layers and experts, not to embeddings, head, norms and routers."""

    name: str
    bits_per_weight: float
    block_size: int = 1
    """Columns of a block with one scale: tensors can only be cut between blocks."""


FP8 = Quantization(name="fp8", bits_per_weight=8)
"""What vLLM makes of a 16-bit checkpoint with `quantization: fp8`."""


def quantization_of(config: Mapping[str, Any]) -> Quantization | None:
    """`quantization_config` of a config.json; None if its weights are not known here.

    Scales count as 16 bits for each group (AWQ, GPTQ: and a zero point of the weights' own bits),
    as 32 bits for each block of FP8. Source: the weight shapes that vLLM 0.29 creates
    (vllm/model_executor/layers/quantization: awq, gptq, fp8, compressed_tensors).
    """
    method = config.get("quant_method")
    if not _leaves_out_only_the_usual(config):
        return None
    if method == "fp8":
        rows, columns = _block(config)
        scales = 32 / (rows * columns) if rows * columns > 1 else 0.0
        return Quantization(name="fp8", bits_per_weight=8 + scales, block_size=columns)
    if method in ("awq", "gptq"):
        return _grouped(str(method), config.get("bits"), config.get("group_size"), zeros=True)
    if method == "compressed-tensors":
        return _compressed(config)
    return None


def _compressed(config: Mapping[str, Any]) -> Quantization | None:
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or len(groups) != 1:
        return None
    (group,) = groups.values()
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping) or group.get("targets") != ["Linear"]:
        return None
    bits = weights.get("num_bits")
    return _grouped("compressed-tensors", bits, weights.get("group_size") or -1, zeros=False)


def _grouped(name: str, bits: Any, group_size: Any, *, zeros: bool) -> Quantization | None:
    if not isinstance(bits, int) or not isinstance(group_size, int) or not 1 <= bits <= 16:
        return None
    scales = (16 + (bits if zeros else 0)) / group_size if group_size > 0 else 0.0
    return Quantization(name=f"{name} {bits} bit", bits_per_weight=bits + scales)


def _leaves_out_only_the_usual(config: Mapping[str, Any]) -> bool:
    listed: list[Any] = []
    for key in ("ignore", "ignored_layers", "modules_to_not_convert"):
        listed += config.get(key) or []
    return all(isinstance(name, str) and _KEPT.search(name) for name in listed)


def _block(config: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns of the blocks of FP8; 1 × 1 where a tensor has one scale."""
    block = config.get("weight_block_size")
    if not isinstance(block, list) or len(block) != 2:
        return 1, 1
    rows, columns = block
    sized = isinstance(rows, int) and isinstance(columns, int) and rows > 0 and columns > 0
    return (rows, columns) if sized else (1, 1)
