"""The arithmetic against the real thing: transformers' own modules and vLLM's own cache code."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from manta.sizing.kv_cache import CacheSettings, cache_of, stages
from manta.sizing.model import model_of
from manta.sizing.weights import num_active_parameters, num_parameters

FACTS = sorted((Path(__file__).parents[2] / "configs" / "models" / "facts").glob("*.json"))

# Small, and with everything turned on that the published ones leave off.
SMALL: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "mistral": {"sliding_window": 64},
    "phi3": {"pad_token_id": 0},
    "qwen2": {},
    "qwen3": {"attention_bias": True, "head_dim": 24},
    "gemma2": {"head_dim": 24},
    "gemma3_text": {"head_dim": 24},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 80,
        "decoder_sparse_step": 2,
    },
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "mlp_only_layers": [1],
        "head_dim": 24,
    },
    "deepseek_v2": {"q_lora_rank": None, "n_routed_experts": 4, "topk_method": "greedy"},
    "deepseek_v3": {"q_lora_rank": 40, "n_routed_experts": 4, "n_group": 1, "topk_group": 1},
}
COMMON = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 112,
    "vocab_size": 200,
}
DEEPSEEK = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "moe_intermediate_size": 48,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
}


def on_meta(config: Any) -> Any:
    """The real module, without any memory for its weights."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("kind", SMALL)
def test_a_config_that_transformers_writes_gives_the_parameters_that_it_builds(
    kind: str, tmp_path: Path
) -> None:
    from transformers import AutoConfig

    extra = DEEPSEEK if kind.startswith("deepseek") else {}
    config = AutoConfig.for_model(kind, **{**COMMON, **extra, **SMALL[kind]})
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert num_parameters(model_of(written)) == count(on_meta(config))


@pytest.mark.parametrize("file", FACTS, ids=lambda file: file.stem)
def test_a_published_model_has_the_parameters_that_transformers_builds(file: Path) -> None:
    from transformers import AutoConfig

    facts = json.loads(file.read_text())
    config = {k: v for k, v in facts["config"].items() if k != "quantization_config"}
    kind = config.pop("model_type")
    built = on_meta(AutoConfig.for_model(kind, **config))
    assert count(built) == facts["num_parameters"]
    assert num_active_parameters(model_of(facts["config"])) <= count(built)


def count(model: Any) -> int:
    """Its parameters, and the router's corrections, which checkpoints hold as well."""
    corrections = [
        b for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")
    ]
    return int(model.num_parameters() + sum(buffer.numel() for buffer in corrections))


@pytest.mark.parametrize("file", FACTS, ids=lambda file: file.stem)
@pytest.mark.parametrize("tensor_parallel", [1, 8])
def test_a_sequence_takes_the_blocks_that_vllm_reckons(file: Path, tensor_parallel: int) -> None:
    import torch
    from vllm.config import CacheConfig
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec, SlidingWindowSpec

    model = model_of(json.loads(file.read_text())["config"])
    settings = CacheSettings(
        max_model_len=8000,
        dtype_bytes=2,
        block_size=16,
        tensor_parallel=tensor_parallel,
        tokens_in_flight=2 * 2048,
    )
    heads = max(1, model.num_kv_heads // tensor_parallel)  # ModelConfig.get_num_kv_heads
    sizes = {"block_size": 16, "num_kv_heads": heads, "head_size": model.head_dim}

    def spec(layer: int) -> Any:
        if model.latent:
            width = model.latent.kv_rank + model.latent.rope_dim
            return MLAAttentionSpec(
                block_size=16, num_kv_heads=1, head_size=width, dtype=torch.bfloat16
            )
        window = model.window(layer)
        if window is None:
            return FullAttentionSpec(**sizes, dtype=torch.bfloat16)
        return SlidingWindowSpec(**sizes, dtype=torch.bfloat16, sliding_window=window)

    cache_config = CacheConfig()
    cache_config.kv_cache_layout = "LBNHC"  # as its engine resolves it
    # What vLLM's functions read of its own configuration.
    config: Any = SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=8000, is_encoder_decoder=False, hf_config=None),
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=1, prefill_context_parallel_size=1
        ),
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        cache_config=cache_config,
        speculative_config=None,
        kv_transfer_config=None,
        kv_events_config=None,
        max_in_flight_tokens=2 * 2048,
    )
    specs = {f"layer.{i}": spec(i) for i in range(model.num_layers)}
    groups = kv_cache_utils.get_kv_cache_groups(config, specs)
    cache = cache_of(model, range(model.num_layers), settings)
    assert cache.pool_block_bytes == kv_cache_utils._pool_bytes_per_block(groups)
    available = 10 * 2**30
    blocks = available // cache.pool_block_bytes
    vllm_says = kv_cache_utils.get_max_concurrency_for_kv_cache_config(
        config, SimpleNamespace(num_blocks=blocks, kv_cache_groups=groups)
    )
    assert cache.num_sequences(available) == int(vllm_says)


def test_layers_are_divided_over_a_pipeline_as_vllm_divides_them() -> None:
    from vllm.distributed.utils import get_pp_indices

    for num_layers in (24, 61, 80, 94):
        for size in (1, 2, 3, 4, 8):
            theirs = [get_pp_indices(num_layers, rank, size) for rank in range(size)]
            assert [(s.start, s.stop) for s in stages(num_layers, size)] == theirs


def test_ray_takes_the_arguments_of_the_ready_settings() -> None:
    from ray.llm._internal.serve.core.ingress.builder import LLMServingArgs
    from ray.llm._internal.serve.serving_patterns.prefill_decode.builder import PDServingArgs

    files = sorted(FACTS[0].parents[1].glob("*.yaml"))
    assert files
    for file in files:
        (app,) = yaml.safe_load(file.read_text())["applications"]
        arguments = {k: v for k, v in app["args"].items() if k != "guard"}
        schema = PDServingArgs if "prefill_config" in arguments else LLMServingArgs
        schema.model_validate(arguments)
