"""Parameters, weights, KV cache and reading speed of models: exact where the world is exact."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from manta.sizing.accelerators import ACCELERATORS, GIB, accelerators_of
from manta.sizing.engine import engine_of
from manta.sizing.fit import certainly_too_much, fit
from manta.sizing.kv_cache import CacheSettings, cache_of, stages
from manta.sizing.model import NotKnown, model_of
from manta.sizing.published import find_model
from manta.sizing.quantization import quantization_of
from manta.sizing.weights import num_active_parameters, num_parameters

ROOT = Path(__file__).parents[2]
FACTS = sorted((ROOT / "configs" / "models" / "facts").glob("*.json"))


def llm(source, accelerator="H100", **engine_kwargs):
    """An entry of `llm_configs`."""
    return engine_of(
        {
            "model_loading_config": {"model_id": "m", "model_source": source},
            "accelerator_type": accelerator,
            "engine_kwargs": engine_kwargs,
        }
    )


def fit_of(source, accelerator="H100", **engine_kwargs):
    engine = llm(source, accelerator, **engine_kwargs)
    return fit(find_model(source, ROOT), engine, ACCELERATORS[accelerator])


LLAMA_8B, LLAMA_70B = "meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-70B-Instruct"
MIXTRAL, DEEPSEEK = "mistralai/Mixtral-8x7B-v0.1", "deepseek-ai/DeepSeek-V3"


@pytest.mark.parametrize("file", FACTS, ids=lambda file: file.stem)
def test_the_parameters_of_a_published_model_are_counted_exactly(file):
    facts = json.loads(file.read_text())
    assert num_parameters(model_of(facts["config"])) == facts["num_parameters"]


def test_every_architecture_that_is_claimed_has_a_published_model_or_a_real_one_to_compare_with():
    from manta.sizing.model import ARCHITECTURES

    published = {json.loads(file.read_text())["config"]["model_type"] for file in FACTS}
    compared_with_transformers = {"phi3", "qwen2_moe", "gemma3_text"}  # test_sizing_models.py
    assert set(ARCHITECTURES) == published | compared_with_transformers


@pytest.mark.parametrize(
    ("source", "billions"),
    # Mixtral's paper: 13B active; DeepSeek-V3's: 37B; Qwen3's: 22B; DeepSeek-V2-Lite's: 2.4B
    # without its embeddings.
    [(MIXTRAL, 12.9), (DEEPSEEK, 37.6), ("Qwen/Qwen3-235B-A22B-FP8", 22.2)],
)
def test_of_a_mixture_of_experts_one_token_passes_only_the_chosen(source, billions):
    assert round(num_active_parameters(find_model(source, ROOT)) / 1e9, 1) == billions


def test_keys_and_values_take_what_the_heads_on_one_accelerator_keep():
    model = find_model(LLAMA_70B, ROOT)
    settings = CacheSettings(max_model_len=8192, dtype_bytes=2, block_size=16)
    whole = 2 * 80 * 8 * 128 * 2  # K and V, layers, heads, numbers of a head, bytes
    for tensor_parallel, share in [(1, 1), (4, 4), (8, 8), (16, 8)]:  # 8 heads cannot be cut in 16
        cache = cache_of(model, range(80), replace(settings, tensor_parallel=tensor_parallel))
        assert cache.bytes_per_token == whole / share
        assert cache.bytes_per_sequence == 8192 * whole / share


def test_latent_attention_keeps_one_compressed_vector_on_every_accelerator():
    settings = CacheSettings(max_model_len=64, dtype_bytes=2, block_size=16, tensor_parallel=8)
    cache = cache_of(find_model(DEEPSEEK, ROOT), range(61), settings)
    assert cache.bytes_per_token == 61 * (512 + 64) * 2


def test_layers_with_a_window_stop_growing():
    model = find_model("google/gemma-2-9b", ROOT)
    settings = CacheSettings(
        max_model_len=8192, dtype_bytes=2, block_size=16, tokens_in_flight=1024
    )
    per_token_of_21 = 21 * 2 * 8 * 256 * 2
    held = (
        8192 + (4096 - 1 + 1024 + 1) + 16
    )  # the full layers', and the windowed ones' and a block
    assert cache_of(model, range(42), settings).bytes_per_sequence == held * per_token_of_21


def test_eight_billion_in_16_bits_fit_24_gib_with_one_long_sequence_and_not_a_longer_one():
    found = fit_of(LLAMA_8B, "L4", max_model_len=16384, max_num_seqs=8)
    assert (found.starts, found.holds_all) == (True, False)
    assert found.weights_bytes == pytest.approx(2 * 8_030_261_248, rel=0.001)
    too_long = fit_of(LLAMA_8B, "L4", max_model_len=131072)
    assert not too_long.starts
    assert too_long.short_bytes == 131072 * 131072 - too_long.cache_bytes  # 128 KiB a token


def test_tensor_parallelism_divides_weights_and_cache():
    one = fit_of(LLAMA_70B, "B200", max_model_len=8192, max_num_seqs=64)
    eight = fit_of(LLAMA_70B, "B200", max_model_len=8192, max_num_seqs=64, tensor_parallel_size=8)
    assert eight.weights_bytes == pytest.approx(one.weights_bytes / 8, rel=0.001)
    assert eight.cache.bytes_per_sequence == one.cache.bytes_per_sequence / 8
    assert eight.decode_s_per_token == pytest.approx(one.decode_s_per_token / 8, rel=0.001)


def test_a_pipeline_divides_layers_and_memory_but_not_the_time_of_a_token():
    one = fit_of(LLAMA_70B, "B200", max_model_len=8192)
    two = fit_of(LLAMA_70B, "B200", max_model_len=8192, pipeline_parallel_size=2)
    assert one.weights_bytes / 2 < two.weights_bytes < one.weights_bytes / 2 * 1.02
    assert two.decode_s_per_token == one.decode_s_per_token
    assert [len(stage) for stage in stages(61, 4)] == [15, 15, 16, 15]


def test_expert_parallelism_keeps_whole_experts():
    cut = fit_of(MIXTRAL, "H100", tensor_parallel_size=8, max_model_len=8192)
    whole = fit_of(
        MIXTRAL, "H100", tensor_parallel_size=8, max_model_len=8192, enable_expert_parallel=True
    )
    assert (
        whole.weights_bytes == cut.weights_bytes
    )  # 8 experts over 8: one each, or an eighth each
    spread = fit_of(
        MIXTRAL,
        "H100",
        tensor_parallel_size=1,
        data_parallel_size=8,
        max_model_len=8192,
        enable_expert_parallel=True,
    )
    assert spread.weights_bytes > whole.weights_bytes  # attention is not divided any more


def test_a_lone_token_cannot_come_faster_than_its_weights_are_read():
    found = fit_of(LLAMA_8B, "L4", max_model_len=8192)
    without_table = 8_030_261_248 - 128256 * 4096  # one row of the embeddings is read, not all
    assert found.decode_s_per_token == pytest.approx(2 * without_table / 300e9, rel=1e-6)
    mixture = fit_of(MIXTRAL, "B200", max_model_len=8192)
    active = 12_879_925_248 - 32000 * 4096
    assert mixture.decode_s_per_token == pytest.approx(2 * active / 8e12, rel=1e-6)


def test_quantised_weights_count_their_scales_and_leave_embeddings_alone():
    model = find_model(LLAMA_8B, ROOT)
    tables = 2 * 128256 * 4096
    plain = fit_of(LLAMA_8B, "L4", max_model_len=4096)
    eight_bit = fit_of(LLAMA_8B, "L4", max_model_len=4096, quantization="fp8")
    norms = 65 * 4096
    assert eight_bit.weights_bytes == plain.weights_bytes - (8_030_261_248 - tables - norms)
    awq = quantization_of({"quant_method": "awq", "bits": 4, "group_size": 128})
    assert awq.bits_per_weight == 4 + 20 / 128
    four_bit = fit(replace(model, quantization=awq), llm(LLAMA_8B, "L4"), ACCELERATORS["L4"])
    # hugging-quants/Meta-Llama-3.1-8B-Instruct-AWQ-INT4 on the Hub is 5.73 GB of safetensors.
    assert four_bit.weights_bytes == pytest.approx(5.73e9, rel=0.01)


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "fp8", "ignored_layers": ["model.layers.3.mlp.down_proj"]},
        {"quant_method": "compressed-tensors", "config_groups": {}},
        {},
    ],
)
def test_a_quantisation_that_is_not_understood_is_not_guessed(config):
    assert quantization_of(config) is None


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"model_type": "mamba2"},
        {"model_type": "llama"},
        {"model_type": "llama", "num_attention_heads": "32"},
        {"model_type": "llama", "num_attention_heads": 8, "num_hidden_layers": 10**9},
    ],
)
def test_a_model_that_is_not_understood_is_not_guessed(config):
    with pytest.raises(NotKnown):
        model_of(config)


def test_a_hub_model_without_facts_is_not_guessed():
    with pytest.raises(NotKnown, match="no facts about `someone/else`"):
        find_model("someone/else", ROOT)


@pytest.mark.parametrize("source", ["~nobody-here/x", "/dev", "/a\0b", "./nowhere"])
def test_a_path_without_a_model_is_not_guessed(source):
    with pytest.raises(NotKnown):
        find_model(source, ROOT)


def test_a_name_that_stands_for_two_sizes_names_both():
    assert [each.name for each in accelerators_of("A100")] == ["A100-40G", "A100-80G"]
    assert accelerators_of("quantum") == ()


def test_a_model_that_vllm_cannot_cut_so_is_said_to_be_so():
    with pytest.raises(NotKnown, match="but 24 layers"):
        fit_of("Qwen/Qwen2.5-0.5B", pipeline_parallel_size=10**9)
    with pytest.raises(NotKnown, match="cannot divide 14 attention heads by 4"):
        fit_of("Qwen/Qwen2.5-0.5B", tensor_parallel_size=4)
    large = {"tensor_parallel_size": 8, "max_model_len": 8192}
    with pytest.raises(NotKnown, match="write `enable_expert_parallel: true`"):
        fit_of("Qwen/Qwen3-235B-A22B-FP8", **large)
    assert fit_of("Qwen/Qwen3-235B-A22B-FP8", **large, enable_expert_parallel=True).starts


def test_a_gpu_without_bfloat16_takes_float16_unless_the_model_cannot():
    assert fit_of(LLAMA_8B, "T4", max_model_len=2048, tensor_parallel_size=2).starts
    with pytest.raises(NotKnown, match="T4 has no bfloat16; write `dtype: float16`"):
        fit_of(LLAMA_8B, "T4", dtype="bfloat16")
    with pytest.raises(NotKnown, match="T4 has no bfloat16, gemma2 needs it"):
        fit_of("google/gemma-2-9b", "T4")


def test_certainly_too_much_leaves_out_every_allowance():
    tight = llm(LLAMA_8B, "L4", max_model_len=40000)
    accelerator, model = ACCELERATORS["L4"], find_model(LLAMA_8B, ROOT)
    assert not fit(model, tight, accelerator).starts
    assert certainly_too_much(model, tight, accelerator) == 0
    sure = llm(LLAMA_8B, "L4", max_model_len=60000)
    assert certainly_too_much(model, sure, accelerator) > 0


def test_a_cpu_engine_holds_what_its_cache_space_holds():
    config = {
        "model_loading_config": {"model_id": "meta-llama/Llama-3.2-1B"},
        "placement_group_config": {"bundles": [{"CPU": 4}]},
        "runtime_env": {"env_vars": {"VLLM_CPU_KVCACHE_SPACE": "4"}},
        "engine_kwargs": {"max_model_len": 8192},
    }
    model = find_model("meta-llama/Llama-3.2-1B", ROOT)
    found = fit(model, engine_of(config), None)
    per_token = 2 * 16 * 8 * 64 * 2
    assert found.num_sequences == 4 * GIB // (8192 * per_token)
    assert found.decode_s_per_token is None
    with pytest.raises(NotKnown, match="VLLM_CPU_KVCACHE_SPACE"):
        fit(model, engine_of({**config, "runtime_env": {}}), None)


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_model_len": "long"},
        {"tensor_parallel_size": 0},
        {"gpu_memory_utilization": 2},
        {"max_num_seqs": True},
    ],
)
def test_a_setting_that_is_no_number_is_not_guessed(arguments):
    with pytest.raises(NotKnown):
        llm(LLAMA_8B, **arguments)
