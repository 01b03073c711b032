"""A small model folder, made in seconds: random weights, a real tokenizer, a real seal."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from manta import storage
from manta.workloads import layout

TEXT = ["def main(argument):\n    return argument\n", "import os\nclass Node:\n    pass\n"] * 20


def write(root: str, name: str, *, seed: int = 0) -> str:
    """Write model `name` under the storage root; returns its folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    fast = tokenizer(["<|end|>"])
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(fast),
            hidden_size=256,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    url = layout.model(name, root)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        fast.save_pretrained(folder)
        storage.upload(Path(folder), url, {"kind": "model", "dataset": {}, "config": {}})
    return url


def tokenizer(special: list[str]) -> Any:
    """Of bytes and a few longer tokens; the first of the special ones ends a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    made.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=special[0])


def adapter(seed: int, *, rank: int = 4, size: int = 256) -> dict[str, bytes]:
    """The files of a LoRA adapter for the model above, as PEFT writes them: name → content.

    With another `size` than the model's it is one for another model.
    """
    import torch
    from safetensors.torch import save

    torch.manual_seed(seed)
    layer = "base_model.model.model.layers.1.mlp.down_proj"
    weights = {
        f"{layer}.lora_A.weight": torch.randn(rank, size),
        f"{layer}.lora_B.weight": torch.randn(256, rank),
    }
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": ["down_proj"]}
    return {
        "adapter_config.json": json.dumps(config).encode(),
        "adapter_model.safetensors": save(weights),
    }
