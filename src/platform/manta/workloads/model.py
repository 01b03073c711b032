"""The model: Llama architecture from transformers, and the loss that a step minimizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from manta.spec import ModelConfig


def build(
    config: ModelConfig, vocab_size: int, seed: int, token_ids: dict[str, int | None]
) -> Any:
    """A LlamaForCausalLM with fresh weights that depend on `seed` alone.

    Args:
        config: the architecture.
        vocab_size: tokens of the tokenizer.
        seed: of the initial weights; also seeds torch's generators of this process.
        token_ids: such as eos_token_id, written into the model's config for generation.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = config.model_dump(exclude={"rope_theta"})
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(**shape, **token_ids, rope_parameters=rope, vocab_size=vocab_size)
    )


class CausalLoss(nn.Module):  # type: ignore[misc]  # torch is Any to mypy here
    """Mean next-token cross-entropy, in nats, of a causal model: the module that is trained."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Scalar loss of token ids [rows, sequence_length]; every row has the same weight."""
        loss = self.model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
        assert isinstance(loss, torch.Tensor)
        return loss


def num_multiplied_parameters(model: Any) -> int:
    """Parameters that a token is multiplied with; see `peak.flops_per_token`."""
    count = sum(int(parameter.numel()) for parameter in model.parameters())
    tied = model.config.tie_word_embeddings
    return count if tied else count - int(model.get_input_embeddings().weight.numel())
