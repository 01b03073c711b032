"""The settings of a vLLM engine that decide what fits, read from an entry of `llm_configs`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from manta.sizing.accelerators import GIB
from manta.sizing.model import DTYPE_BYTES, Model, NotKnown

# vLLM 0.29: config/cache.py, engine/arg_utils.py (`get_batch_defaults`, for an API server).
DEFAULT_GPU_MEMORY_UTILIZATION = 0.92
GPU_BLOCK_SIZE, CPU_BLOCK_SIZE, CPU_LATENT_BLOCK_SIZE = 16, 128, 16

_CACHE_DTYPES = {"fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1} | dict(DTYPE_BYTES)
_BESIDES = (
    "enable_lora",
    "speculative_config",
    "cpu_offload_gb",
    "kv_offloading_size",
    "num_gpu_blocks_override",
    "limit_mm_per_prompt",
    "offload_group_size",
)
"""Arguments that change what fits and are not in the arithmetic."""


@dataclass(frozen=True, kw_only=True)
class Engine:
    """What is asked of one engine; None is left to vLLM."""

    model_id: str
    model_source: str
    accelerator: str | None
    """Ray's `accelerator_type`; None is a CPU."""
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    data_parallel: int = 1
    context_parallel: int = 1
    expert_parallel: bool = False
    gpu_memory_utilization: float = DEFAULT_GPU_MEMORY_UTILIZATION
    dtype: str | None = None
    kv_cache_dtype: str | None = None
    kv_cache_bytes: int | None = None
    """Fixed by the file; on a CPU it must be."""
    block_size: int | None = None
    quantization: str | None = None
    is_eager: bool = False
    not_counted: tuple[str, ...] = ()
    """Arguments whose memory is not in the arithmetic."""

    @property
    def num_accelerators(self) -> int:
        """Accelerators of one replica."""
        return self.tensor_parallel * self.pipeline_parallel

    @property
    def cache_bytes_are_set(self) -> bool:
        """Whether the file says how much KV cache there is; else it gets what is left."""
        return self.kv_cache_bytes is not None

    @property
    def num_expert_ranks(self) -> int:
        """Accelerators over which whole experts are divided; 1: each expert is cut."""
        return self.tensor_parallel * self.data_parallel if self.expert_parallel else 1


def engine_of(config: Mapping[str, Any]) -> Engine:
    """The engine that an entry of `llm_configs` describes.

    Raises:
        NotKnown: a setting has a value that no arithmetic can be done with.
    """
    loading = _mapping(config, "model_loading_config")
    arguments = _mapping(config, "engine_kwargs")
    for name in ("hf_overrides", "hf_config_path"):
        if arguments.get(name):
            raise NotKnown(f"`{name}` makes it another model than its config.json says")
    model_id = str(loading.get("model_id", "?"))
    source = loading.get("model_source") or model_id
    accelerator = config.get("accelerator_type")
    return Engine(
        model_id=model_id,
        model_source=source if isinstance(source, str) else "?",
        accelerator=_accelerator(config) if accelerator is None else str(accelerator),
        max_model_len=_count(arguments, "max_model_len"),
        max_num_seqs=_count(arguments, "max_num_seqs"),
        max_num_batched_tokens=_count(arguments, "max_num_batched_tokens"),
        tensor_parallel=_count(arguments, "tensor_parallel_size") or 1,
        pipeline_parallel=_count(arguments, "pipeline_parallel_size") or 1,
        data_parallel=_count(arguments, "data_parallel_size") or 1,
        context_parallel=_count(arguments, "decode_context_parallel_size") or 1,
        expert_parallel=bool(arguments.get("enable_expert_parallel")),
        gpu_memory_utilization=_share(arguments),
        dtype=_word(arguments, "dtype"),
        kv_cache_dtype=_word(arguments, "kv_cache_dtype"),
        kv_cache_bytes=_count(arguments, "kv_cache_memory_bytes") or _cpu_space(config),
        block_size=_count(arguments, "block_size"),
        quantization=_word(arguments, "quantization"),
        is_eager=bool(arguments.get("enforce_eager")),
        not_counted=tuple(name for name in _BESIDES if arguments.get(name)),
    )


def default_batch(memory_bytes: int, accelerator: str | None, workers: int) -> tuple[int, int]:
    """vLLM's own `max_num_batched_tokens` and `max_num_seqs` for an API server."""
    if accelerator is None:
        return 2048 * workers, 128 * workers
    if memory_bytes >= 160 * GIB:
        return 16384, 1024
    if memory_bytes >= 70 * GIB and not accelerator.startswith("A100"):
        return 8192, 1024
    return 2048, 256


def weights_dtype(engine: Engine, model: Model) -> str:
    """The type that weights are kept in. Raises NotKnown for one without a known size."""
    dtype = engine.dtype if engine.dtype not in (None, "auto") else model.dtype
    if dtype not in DTYPE_BYTES:
        raise NotKnown(f"the size of dtype `{dtype}` is not known")
    if engine.dtype in (None, "auto") and DTYPE_BYTES[dtype] == 4:
        return "float16"  # vLLM's "auto" halves a checkpoint of 32 bits
    return dtype


def cache_dtype_bytes(engine: Engine, model: Model) -> int:
    """Bytes of a number in the KV cache. Raises NotKnown for a type without a known size."""
    given = engine.kv_cache_dtype
    if given in (None, "auto"):
        return DTYPE_BYTES[weights_dtype(engine, model)]
    if given not in _CACHE_DTYPES:
        raise NotKnown(f"the size of kv_cache_dtype `{given}` is not known")
    return _CACHE_DTYPES[given]


def block_size(engine: Engine, model: Model) -> int:
    """Tokens of one block of the cache."""
    if engine.block_size:
        return engine.block_size
    if engine.accelerator is None:
        return CPU_LATENT_BLOCK_SIZE if model.latent else CPU_BLOCK_SIZE
    return GPU_BLOCK_SIZE


def _mapping(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = config.get(key)
    return value if isinstance(value, Mapping) else {}


def _accelerator(config: Mapping[str, Any]) -> str | None:
    """`?` where bundles ask for a GPU without its name; None for a CPU."""
    group = _mapping(config, "placement_group_config")
    bundles = group.get("bundles") or [group.get("bundle_per_worker")]
    listed = [b for b in bundles if isinstance(b, Mapping)] if isinstance(bundles, list) else []
    for bundle in listed:
        for resource in bundle:
            if str(resource).startswith("accelerator_type:"):
                return str(resource).partition(":")[2]
    if any(bundle.get("GPU") for bundle in listed):
        return "?"
    return None if listed else "?"  # without bundles ray.serve.llm takes GPUs


def _cpu_space(config: Mapping[str, Any]) -> int | None:
    variables = _mapping(_mapping(config, "runtime_env"), "env_vars")
    given = str(variables.get("VLLM_CPU_KVCACHE_SPACE", ""))
    return int(given) * GIB if given.isdecimal() and 0 < len(given) < 6 else None


def _count(arguments: Mapping[str, Any], name: str) -> int | None:
    value = arguments.get(name)
    if value is None or value == "auto":
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 10**15:
        raise NotKnown(f"{name} is not a count")
    return value


def _share(arguments: Mapping[str, Any]) -> float:
    value = arguments.get("gpu_memory_utilization", DEFAULT_GPU_MEMORY_UTILIZATION)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= 1:
        raise NotKnown("gpu_memory_utilization is not above 0 and at most 1")
    return float(value)


def _word(arguments: Mapping[str, Any], name: str) -> str | None:
    value = arguments.get(name)
    return None if value is None else str(value)
