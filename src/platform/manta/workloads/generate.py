"""Batch inference: `ray.data.llm` with vLLM, in shards that survive a crash.

A run lies in `generations/NAME/VERSION`; the version is a hash of prompts, model and sampling. So
the same work goes on where it stopped, and other work under the same name is another run.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError

from manta import storage
from manta.errors import InputError, MantaError
from manta.spec import GenerateConfig
from manta.workloads import code, layout, session
from manta.workloads.entry import measured, progress
from manta.workloads.prompts import Prompts, Row, Shard, cut, digest, read_prompts

if TYPE_CHECKING:
    from ray.data.llm import Processor

CPU_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; the default takes much of the machine's memory
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "TORCH_COMPILE_DISABLE": "1",  # or the first sampled row waits for a C++ compiler
    "VLLM_LOGGING_LEVEL": "ERROR",
    # On a CPU vLLM would otherwise start one more process for its worker, seconds of imports.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
SMALL_STAGE_CPUS = 0.1
"""Stages of a whole CPU each would leave none for the engine on a small cluster: a stall."""


@dataclass(frozen=True)
class Answer:
    """What the engine gave for one row; `error` is empty if it succeeded."""

    position: int
    completion: str
    num_generated_tokens: int
    error: str


@dataclass
class Tally:
    """What has happened so far; the one thing here that changes."""

    num_rows: int = 0
    num_tokens: int = 0
    failed: list[Answer] = field(default_factory=list)


def generate(config: GenerateConfig) -> dict[str, str]:
    """Complete every prompt; returns the URL of the folder of Parquet shards."""
    prompts = read_prompts(config.prompts, config.prompt_field)
    model_url = layout.find_model(config.model)
    model = _model_identity(config.model, model_url)
    version = _version(config, prompts, model)
    folder = storage.join(layout.generation(config.name), version)
    shards = cut(prompts.rows, config.rows_per_shard)
    missing = [shard for shard in shards if not storage.exists(storage.join(folder, shard.name))]
    progress(
        f"{len(prompts.rows)} prompts in {len(shards)} shards, {len(shards) - len(missing)} of "
        f"them finished before"
    )
    if missing:
        storage.delete(storage.join(folder, storage.SEAL))  # a shard was deleted by hand
        _complete(config, model_url, prompts, missing, folder)
    _finish(config, folder, shards, model, version)
    return {"completions": folder}


def _version(config: GenerateConfig, prompts: Prompts, model: str) -> str:
    """What decides the content of the output: change one of these, and it is another run."""
    return digest(
        {
            "prompts": digest(prompts.rows),
            "prompt_field": config.prompt_field,
            "rows_per_shard": config.rows_per_shard,
            "model": model,
            "sampling": config.sampling.model_dump(mode="json"),
            "engine": config.engine_kwargs_passthrough,
        }
    )[:12]


def _model_identity(reference: str, url: str) -> str:
    """Hash of a sealed model's weights and tokenizer; without a seal, of the folder's listing."""
    if "/" not in reference or storage.exists(storage.join(url, storage.SEAL)):
        return layout.model_content(storage.read_seal(url, f"model `{reference}`"))
    if not storage.exists(storage.join(url, "config.json")):
        raise InputError(
            f"{url}: not a model folder (no config.json)", "give a model's name or URL"
        )
    return digest({name: storage.size(name) for name in storage.glob(url)})


def _complete(
    config: GenerateConfig, model_url: str, prompts: Prompts, missing: list[Shard], folder: str
) -> None:
    """Run the engine over the missing shards, writing each as soon as all its rows are there."""
    session.connect()
    started = time.monotonic()
    tally = Tally()
    open_shards = {shard.start: shard for shard in missing}
    answers: dict[int, list[Answer]] = {shard.start: [] for shard in missing}
    progress("starting the engine")
    for answer in _answers(config, model_url, prompts, missing):
        tally.num_rows += 1
        tally.num_tokens += answer.num_generated_tokens
        if answer.error:
            tally.failed.append(answer)
        start = answer.position - answer.position % config.rows_per_shard
        answers[start].append(answer)
        shard = open_shards[start]
        if len(answers[start]) < len(shard.rows):
            continue
        done = answers.pop(start)
        if not any(one.error for one in done):
            _write(folder, shard, done)
        rate = tally.num_tokens / (time.monotonic() - started)
        progress(f"{tally.num_rows} rows done, {rate:.0f} tokens/s since the start")
    seconds = time.monotonic() - started
    measured(rows=tally.num_rows, tokens=tally.num_tokens, tokens_per_s=tally.num_tokens / seconds)
    if tally.failed:
        first = min(tally.failed, key=lambda answer: answer.position)
        raise MantaError(
            f"{len(tally.failed)} of {tally.num_rows} rows failed; the first is "
            f"{prompts.places[first.position]}: {first.error}",
            "correct those prompts and run the step again",
        )


def _answers(
    config: GenerateConfig, model_url: str, prompts: Prompts, missing: Sequence[Shard]
) -> Iterator[Answer]:
    """Feed the shards to the engine; answers come in any order."""
    import pyarrow as pa

    key = "messages" if prompts.is_chat else "prompt"
    tables = [
        pa.table(
            {
                "position": range(shard.start, shard.start + len(shard.rows)),
                key: [row[config.prompt_field] for row in shard.rows],
            }
        )
        for shard in missing
    ]
    processor = _processor(config, model_url, is_chat=prompts.is_chat)
    with _engine_errors():
        for row in processor(ray.data.from_arrow(tables)).iter_rows():
            yield Answer(
                int(row["position"]),
                row["generated_text"],
                int(row["num_generated_tokens"]),
                row["__inference_error__"],
            )


def _processor(config: GenerateConfig, model_url: str, *, is_chat: bool) -> Processor:
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    from manta.workloads.engine import StorageEngine

    processor = build_processor(
        vLLMEngineProcessorConfig(**_engine(config, _local_model(model_url), is_chat=is_chat)),
        preprocess=lambda row: {"sampling_params": config.sampling.model_dump()},
        postprocess=lambda row: {
            "position": row["position"],
            "generated_text": row["generated_text"],
            "num_generated_tokens": row["num_generated_tokens"],
        },
        preprocess_map_kwargs={"num_cpus": SMALL_STAGE_CPUS},
        postprocess_map_kwargs={"num_cpus": SMALL_STAGE_CPUS},
    )
    stage = processor.get_stage_by_name("vLLMEngineStage")
    arguments = {**stage.fn_constructor_kwargs, "model_url": model_url}
    # A copy: assigning to the stage runs its validator again, which would then ask for a GPU.
    processor.stages["vLLMEngineStage"] = stage.model_copy(
        update={"fn": StorageEngine, "fn_constructor_kwargs": arguments}
    )
    return processor


@contextlib.contextmanager
def _engine_errors() -> Iterator[None]:
    """Ray's report of a failed engine goes into the log; its last line is what went wrong."""
    try:
        yield
    except RayError as error:
        report = str(error).strip()
        progress(report)
        raise MantaError(
            f"the engine failed: {report.splitlines()[-1].strip()}",
            "see its log above; finished shards are kept",
        ) from error


def _engine(config: GenerateConfig, model_path: str, *, is_chat: bool) -> dict[str, Any]:
    """Arguments of Ray's vLLM processor. The engine itself tokenizes plain prompts."""
    stage = {"enabled": True, "num_cpus": SMALL_STAGE_CPUS}
    engine: dict[str, Any] = {
        "model_source": model_path,
        "engine_kwargs": dict(config.engine_kwargs_passthrough),
        "concurrency": config.concurrency,
        "batch_size": config.batch_size,
        "chat_template_stage": stage if is_chat else False,
        "tokenize_stage": stage if is_chat else False,
        "detokenize_stage": False,
        "should_continue_on_error": True,  # one bad prompt must not cost the others
    }
    if config.accelerator_type is not None:
        return {**engine, "accelerator_type": config.accelerator_type}
    return {
        **engine,
        "placement_group_config": {"bundles": [{"CPU": 1}]},
        "runtime_env": {"env_vars": CPU_ENVIRONMENT},
    }


def _local_model(url: str) -> str:
    """The model on this node; each engine gets a verified copy of its own, see StorageEngine."""
    if not storage.exists(storage.join(url, storage.SEAL)):
        return url
    return str(storage.cached_copy(url, f"model {url}"))


def _write(folder: str, shard: Shard, answers: Sequence[Answer]) -> None:
    """Write one finished shard: the input's columns, the completion, its number of tokens."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows: list[Row] = [
        {
            **row,
            "completion": answer.completion,
            "num_generated_tokens": answer.num_generated_tokens,
        }
        for row, answer in zip(shard.rows, sorted(answers, key=_position), strict=True)
    ]
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    storage.write_bytes(storage.join(folder, shard.name), buffer.getvalue().to_pybytes())


def _position(answer: Answer) -> int:
    return answer.position


def _finish(
    config: GenerateConfig, folder: str, shards: Sequence[Shard], model: str, version: str
) -> None:
    if storage.exists(storage.join(folder, storage.SEAL)):
        storage.read_seal(folder, f"generation `{config.name}`")
        return
    wanted = {shard.name for shard in shards}
    for url in storage.glob(folder):  # a killed writer leaves a partial file
        if url.rpartition("/")[2] not in wanted:
            storage.delete(url)
    storage.seal(
        folder,
        {
            "kind": "generation",
            "version": version,
            "model": {"reference": config.model, "content": model},
            "num_rows": sum(len(shard.rows) for shard in shards),
            "config": config.model_dump(mode="json"),
            "code_version": code.version(),
        },
    )
    newest = storage.join(layout.generation(config.name), "LATEST")
    storage.write_bytes(newest, f"{version}\n".encode())
