"""A trained model as a Hugging Face folder that transformers and vLLM load."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from manta import storage


def token_ids(dataset_url: str) -> dict[str, int | None]:
    """Special token ids of a dataset's tokenizer, as a model config names them; None if unused."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory(prefix="manta-") as folder:
        copy_tokenizer(dataset_url, Path(folder))
        tokenizer = AutoTokenizer.from_pretrained(folder)
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: getattr(tokenizer, name) for name in names}


def copy_tokenizer(dataset_url: str, folder: Path) -> None:
    """Copy the dataset's tokenizer files, chat template included, into a local folder."""
    filesystem, path = storage.filesystem(storage.join(dataset_url, "tokenizer"))
    for file in filesystem.find(path):
        filesystem.get_file(file, str(folder / Path(file).name))


def export(
    model: Any,
    weights: dict[str, torch.Tensor],
    dtype: torch.dtype,
    *,
    dataset_url: str,
    model_url: str,
    facts: dict[str, Any],
) -> None:
    """Write config, safetensors and tokenizer to `model_url`, sealed with `facts`.

    Args:
        model: the transformers model, for its config; its own weights are not read.
        weights: whole state dict, on CPU.
        dtype: what the run computed in, and what is written.
    """
    whole = {name: tensor.to(dtype) for name, tensor in weights.items()}
    model.config.dtype = dtype
    with tempfile.TemporaryDirectory(prefix="manta-") as folder:
        model.save_pretrained(folder, state_dict=whole)
        copy_tokenizer(dataset_url, Path(folder))
        storage.upload(folder, model_url, facts)
