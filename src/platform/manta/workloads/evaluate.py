"""Scores an exported model on held-out text, and writes its model card."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from manta import storage
from manta.errors import InputError, MantaError
from manta.spec import EvaluateConfig
from manta.workloads import bits, code, layout, session
from manta.workloads.card import model_card
from manta.workloads.entry import measured, progress

MIN_BYTES_PER_TASK = 100_000
"""Below this, loading the model costs a task more than scoring."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Scores on whole held-out documents, in bits for each UTF-8 byte; lower is better."""

    dataset: str
    dataset_version: str
    num_documents: int
    num_bytes: int
    num_tokens: int
    window_tokens: int
    stride_tokens: int
    model: float
    unigram: float
    xz: float
    xz_each_document: float

    @property
    def table(self) -> list[tuple[str, float]]:
        """Method and bits per byte, best explained first."""
        return [
            ("this model", self.model),
            ("xz -9e, all documents as one stream", self.xz),
            ("xz -9e, each document alone", self.xz_each_document),
            ("unigram token model", self.unigram),
        ]


def evaluate(config: EvaluateConfig) -> dict[str, str]:
    """Score the model, add evaluation.json and README.md to its folder; returns their URLs."""
    model_url, dataset_url = layout.model(config.model), layout.find_dataset(config.dataset)
    seal = storage.read_seal(model_url, f"model `{config.model}`")
    storage.read_seal(dataset_url, f"dataset `{config.dataset}`")
    _warn_of_other_dataset(seal, config, storage.read_json(f"{dataset_url}/manifest.json"))
    documents = held_out(dataset_url, config.max_bytes)
    size = sum(len(text.encode()) for text in documents)
    progress(f"scoring {len(documents)} held-out documents, {size:,} bytes")
    evaluation = score(config, model_url, dataset_url, documents)
    for name, value in evaluation.table:
        progress(f"{value:7.3f} bits per byte  {name}")
    _write(config, model_url, seal, evaluation)
    return {
        "evaluation": storage.join(model_url, "evaluation.json"),
        "model card": storage.join(model_url, "README.md"),
    }


def held_out(dataset_url: str, max_bytes: int) -> list[str]:
    """Whole held-out texts, in the order of their ids, each that still fits into `max_bytes`."""
    import pyarrow.parquet as pq

    rows: list[tuple[str, str]] = []
    for url in storage.glob(storage.join(dataset_url, "validation_text", "*.parquet")):
        fs, path = storage.filesystem(url)
        with fs.open(path, "rb") as file:
            table = pq.read_table(file, columns=["id", "text"])
        rows += zip(table["id"].to_pylist(), table["text"].to_pylist(), strict=True)
    documents, left = [], max_bytes
    for _, text in sorted(rows):
        if text and (size := len(text.encode())) <= left:
            documents.append(text)
            left -= size
    if not documents:
        smallest = min((len(text.encode()) for _, text in rows if text), default=0)
        raise InputError(
            f"no held-out document of {dataset_url} fits into max_bytes {max_bytes:,}",
            f"write max_bytes: {smallest} or more"
            if smallest
            else "the dataset holds out no text",
        )
    return documents


def score(
    config: EvaluateConfig, model_url: str, dataset_url: str, documents: list[str]
) -> Evaluation:
    """Score in Ray tasks of one GPU, or else one CPU, each."""
    import lzma  # noqa: F401  a Python built without it fails here, before the long part

    session.connect()
    gpu = ray.cluster_resources().get("GPU", 0) >= 1
    num_slots = int(ray.cluster_resources().get("GPU" if gpu else "CPU", 1))
    run = _score.options(num_gpus=1) if gpu else _score.options(num_cpus=1)
    shares = split(documents, num_slots)
    pending = [run.remote(config, model_url, dataset_url, share) for share in shares]
    whole = _xz.remote(b"".join(text.encode() for text in documents))
    parts = []
    for done, reference in enumerate(pending, 1):
        parts.append(_result(reference))
        if len(pending) > 1:
            progress(f"{done} of {len(pending)} parts scored")
    num_bytes = sum(part["num_bytes"] for part in parts)
    manifest = storage.read_json(f"{dataset_url}/manifest.json")

    def per_byte(key: str) -> float:
        return float(round(sum(part[key] for part in parts) / num_bytes, 6))

    return Evaluation(
        dataset=config.dataset,
        dataset_version=manifest["version"],
        num_documents=len(documents),
        num_bytes=num_bytes,
        num_tokens=sum(part["num_tokens"] for part in parts),
        window_tokens=parts[0]["window_tokens"],
        stride_tokens=parts[0]["stride_tokens"],
        model=per_byte("model_bits"),
        unigram=per_byte("unigram_bits"),
        xz=round(_result(whole) / num_bytes, 6),
        xz_each_document=per_byte("xz_bits"),
    )


def split(documents: Sequence[str], num_slots: int) -> list[list[str]]:
    """Shares of about equal size: at most one a slot, and none that is not worth a task."""
    total = sum(map(len, documents))
    count = max(1, min(num_slots, total // MIN_BYTES_PER_TASK, len(documents)))
    shares: list[list[str]] = [[] for _ in range(count)]
    sizes = [0] * count
    for text in sorted(documents, key=len, reverse=True):
        smallest = sizes.index(min(sizes))
        shares[smallest].append(text)
        sizes[smallest] += len(text)
    return shares


@ray.remote(max_retries=3)  # type: ignore[untyped-decorator]
def _score(
    config: EvaluateConfig, model_url: str, dataset_url: str, documents: list[str]
) -> dict[str, Any]:
    model, tokenizer = _load(model_url)
    dataset_vocab, counts, sequence_length = _dataset(dataset_url)
    if tokenizer.get_vocab() != dataset_vocab:
        raise InputError(
            f"model `{config.model}` and dataset `{config.dataset}` have different tokenizers",
            "evaluate on the dataset that the model was trained on",
        )
    tokens = [tokenizer.encode(text, add_special_tokens=False) for text in documents]
    for text, ids in zip(documents, tokens, strict=True):
        if tokenizer.decode(ids, clean_up_tokenization_spaces=False) != text:
            raise MantaError("the tokenizer does not give a text back, so bytes mean nothing")
    length = min(model.config.max_position_embeddings, sequence_length)
    stride = max(1, length * 3 // 4)
    start = (
        tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    )
    nbits = bits.model_bits(
        model,
        tokens,
        start_token=start or 0,
        length=length,
        stride=stride,
        batch_size=config.batch_size,
    )
    return {
        "num_bytes": sum(len(text.encode()) for text in documents),
        "num_tokens": sum(map(len, tokens)),
        "window_tokens": length,
        "stride_tokens": stride,
        "model_bits": sum(nbits),
        "unigram_bits": bits.unigram_bits(tokens, counts),
        "xz_bits": sum(bits.xz_bits(text.encode()) for text in documents),
    }


@ray.remote(num_cpus=1)  # type: ignore[untyped-decorator]
def _xz(data: bytes) -> int:
    return bits.xz_bits(data)


def _result(reference: Any) -> Any:
    with session.plain_errors():
        return ray.get(reference)


@functools.cache
def _load(model_url: str) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    with storage.local_copy(model_url, f"model {model_url}") as folder:
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def _dataset(dataset_url: str) -> tuple[dict[str, int], list[int], int]:
    """Vocabulary, token counts over the training blocks, and block length of a dataset."""
    from transformers import AutoTokenizer

    with storage.local_copy(dataset_url, f"dataset {dataset_url}") as folder:
        vocab = AutoTokenizer.from_pretrained(folder / "tokenizer").get_vocab()
        counts = json.loads(Path(folder, "unigram.json").read_text())["counts"]
        manifest = json.loads(Path(folder, "manifest.json").read_text())
    return vocab, counts, manifest["sequence_length"]


def _warn_of_other_dataset(
    seal: dict[str, Any], config: EvaluateConfig, manifest: dict[str, Any]
) -> None:
    trained_on = seal.get("dataset", {}).get("version")
    if trained_on != manifest["version"]:
        progress(
            f"warning: `{config.model}` was trained on dataset version {trained_on}, "
            f"`{config.dataset}` is {manifest['version']}; it may have seen this text"
        )


def _write(
    config: EvaluateConfig, model_url: str, seal: dict[str, Any], evaluation: Evaluation
) -> None:
    scores = {
        "kind": "evaluation",
        "bits_per_byte": dataclasses.asdict(evaluation),
        "config": config.model_dump(mode="json"),
        "code_version": code.version(),
    }
    files = {
        "evaluation.json": (json.dumps(scores, indent=2, sort_keys=True) + "\n").encode(),
        "README.md": model_card(config, seal, evaluation).encode(),
    }
    measured(bits_per_byte=evaluation.model)
    metrics = {**(seal.get("metrics") or {}), "bits_per_byte": evaluation.model}
    storage.amend(model_url, files, seal, metrics=metrics)
