"""One training run as a value: what its workers are told, and what it is checked against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from manta import storage
from manta.errors import InputError
from manta.spec import TrainConfig
from manta.workloads import blocks, code, layout
from manta.workloads.blocks import Blocks
from manta.workloads.checkpoints import Identity


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run whose config fits its dataset. URLs are absolute: workers have other folders."""

    config: TrainConfig
    dataset_url: str
    dataset_version: str
    run_url: str
    model_url: str
    vocab_size: int
    train: Blocks
    validation: Blocks
    code_version: str

    @property
    def identity(self) -> Identity:
        """Dotted name → value of all that decides what the run computes.

        Left out: what changes only where and how it is computed (workers, micro-batches) and
        what is said about it (logging, validation). A run may go on with those changed.
        """
        config = self.config
        sections = {"model": config.model, "optimizer": config.optimizer}
        nested = {
            f"{section}.{key}": value
            for section, part in sections.items()
            for key, value in part.model_dump().items()
        }
        return nested | {
            "dataset version": self.dataset_version,
            "num_steps": config.num_steps,
            "global_batch_size": config.global_batch_size,
            "seed": config.seed,
            "precision": config.precision,
        }

    @property
    def facts(self) -> dict[str, Any]:
        """Where the model came from, for its seal."""
        return {
            "kind": "model",
            "dataset": {"reference": self.config.dataset, "version": self.dataset_version},
            "config": self.config.model_dump(mode="json"),
            "code_version": self.code_version,
            "parent": None,
        }


def prepare(config: TrainConfig) -> Job:
    """Check `config` against its dataset. Raises InputError for what does not fit."""
    dataset_url = absolute(layout.find_dataset(config.dataset))
    storage.read_seal(dataset_url, f"dataset `{config.dataset}`")
    manifest = storage.read_json(storage.join(dataset_url, "manifest.json"))
    length = int(manifest["sequence_length"])
    _check_length(config, length)
    job = Job(
        config=config,
        dataset_url=dataset_url,
        dataset_version=manifest["version"],
        run_url=absolute(storage.join(layout.runs("train"), config.name)),
        model_url=absolute(layout.model(config.name)),
        vocab_size=int(manifest["vocab_size"]),
        train=blocks.index(dataset_url, "train", length),
        validation=blocks.index(dataset_url, "validation", length),
        code_version=code.version(),
    )
    _check_batch(config, job.train.num_rows)
    return job


def override(config: TrainConfig, values: Mapping[str, Any]) -> TrainConfig:
    """`config` with dotted keys set. Raises InputError if a key or value does not fit."""
    content = config.model_dump()
    for key, value in values.items():
        *parents, last = key.split(".")
        target: Any = content
        for parent in parents:
            target = target.get(parent) if isinstance(target, dict) else None
        if not isinstance(target, dict) or last not in target:
            raise InputError(f"`{key}` is no key of a training config", "e.g. optimizer.beta2")
        target[last] = value
    try:
        return TrainConfig.model_validate(content)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        where = ".".join(map(str, fault["loc"]))
        raise InputError(f"`{where}` cannot be {fault['input']!r}: {fault['msg']}") from None


def absolute(url: str) -> str:
    """A local path made absolute; any other URL as it is."""
    return storage.filesystem(url)[1] if storage.is_local(url) else url


def _check_length(config: TrainConfig, length: int) -> None:
    most = config.model.max_position_embeddings
    if length > most:
        raise InputError(
            f"dataset `{config.dataset}` has blocks of {length} tokens, over "
            f"model.max_position_embeddings {most}",
            f"write max_position_embeddings: {length}, or prepare the dataset with "
            f"sequence_length: {most}",
        )


def _check_batch(config: TrainConfig, num_rows: int) -> None:
    if num_rows < config.global_batch_size:
        raise InputError(
            f"dataset `{config.dataset}` has {num_rows} training blocks, fewer than one "
            f"global batch of {config.global_batch_size}",
            "lower global_batch_size, or prepare more text",
        )
