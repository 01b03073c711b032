"""Requests that end vLLM's engine for everybody: refused before they reach it.

With adapters enabled vLLM 0.29 computes a prompt's log-probabilities by the adapters of the batch
that is being sampled, which has another number of rows: `bgmv_shrink` raises in the engine's core
as soon as the two differ, and every request of the replica fails. One such request among others is
enough. tests/integration/endpoint/test_hostile.py
"""

from __future__ import annotations

from typing import Any

NO_PROMPT_LOGPROBS = (
    "an engine that loads adapters has no log-probabilities of prompts "
    "(`prompt_logprobs`, `echo` with `logprobs`)"
)


def refuse(engine_client: Any) -> None:
    """Have vLLM's own check of parameters, which every route goes through, refuse them."""
    processor = engine_client.input_processor
    if engine_client.vllm_config.lora_config is None:
        return
    theirs = processor._validate_params

    def validate(params: Any, *arguments: Any, **named: Any) -> None:
        from vllm.exceptions import VLLMValidationError

        if getattr(params, "prompt_logprobs", None) is not None:
            raise VLLMValidationError(NO_PROMPT_LOGPROBS, parameter="prompt_logprobs")
        theirs(params, *arguments, **named)

    processor._validate_params = validate
