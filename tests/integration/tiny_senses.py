"""Small models with eyes or ears, made in seconds: random weights, real processors, real seals."""

from __future__ import annotations

import io
import tempfile
import wave
from pathlib import Path
from typing import Any

import tiny_model

from manta import storage
from manta.workloads import layout

IMAGE_SIZE = 28
NUM_IMAGE_TOKENS = 4
"""Of any picture."""


def write_eyes(root: str, name: str) -> str:
    """A BLIP-2, which vLLM reads without torchvision: a tower, a Q-Former and an OPT."""
    import torch
    from transformers import (
        Blip2Config,
        Blip2ForConditionalGeneration,
        Blip2Processor,
        Blip2QFormerConfig,
        Blip2VisionConfig,
        BlipImageProcessorPil,
        OPTConfig,
    )

    tokenizer = tiny_model.tokenizer(["<|end|>", "<pad>"])
    tokenizer.pad_token = "<pad>"
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    pictures = BlipImageProcessorPil(size=size)
    processor = Blip2Processor(pictures, tokenizer, num_query_tokens=NUM_IMAGE_TOKENS)
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = Blip2ForConditionalGeneration(
        Blip2Config(
            vision_config=Blip2VisionConfig(
                **shape,
                intermediate_size=64,
                image_size=IMAGE_SIZE,
                patch_size=14,
                initializer_range=0.2,
            ),
            qformer_config=Blip2QFormerConfig(
                **shape, intermediate_size=64, vocab_size=8, encoder_hidden_size=64
            ),
            text_config=OPTConfig(
                **shape,
                architectures=["OPTForCausalLM"],
                vocab_size=len(tokenizer),
                ffn_dim=64,
                word_embed_proj_dim=64,
                max_position_embeddings=256,
                pad_token_id=tokenizer.pad_token_id,
                bos_token_id=0,
                eos_token_id=0,
            ),
            num_query_tokens=NUM_IMAGE_TOKENS,
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        )
    )
    for loud in (model.query_tokens, model.language_projection.weight):
        torch.nn.init.normal_(loud)  # or all pictures look alike to weights this small
    return _save(root, name, model, processor)


def write_ears(root: str, name: str) -> str:
    """A Whisper with one layer on each side."""
    import torch
    from transformers import (
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperProcessor,
        WhisperTokenizer,
    )

    plain = tiny_model.tokenizer(["<|endoftext|>"])
    tokenizer = WhisperTokenizer(vocab=plain.get_vocab(), merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": SPOKEN})
    processor = WhisperProcessor(WhisperFeatureExtractor(feature_size=80), tokenizer)
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    start = tokenizer.convert_tokens_to_ids("<|startoftranscript|>")
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=len(tokenizer),
            num_mel_bins=80,
            d_model=64,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            max_source_positions=1500,
            max_target_positions=64,
            decoder_start_token_id=start,
            pad_token_id=end,
            bos_token_id=end,
            eos_token_id=end,
            suppress_tokens=[],
            begin_suppress_tokens=[],
        )
    )
    model.generation_config.forced_decoder_ids = None
    return _save(root, name, model, processor)


SPOKEN = [
    "<|startoftranscript|>",
    "<|en|>",
    "<|translate|>",
    "<|transcribe|>",
    "<|startoflm|>",
    "<|startofprev|>",
    "<|nospeech|>",
    "<|notimestamps|>",
    *(f"<|{number * 0.02:.2f}|>" for number in range(1501)),
]


def picture(color: tuple[int, int, int] = (200, 30, 30), size: int = 40) -> bytes:
    """A PNG of one colour."""
    from PIL import Image

    content = io.BytesIO()
    Image.new("RGB", (size, size), color).save(content, "PNG")
    return content.getvalue()


def sound(seconds: float = 1.0, rate_hz: int = 16_000) -> bytes:
    """A WAV file with a tone of 440 Hz."""
    import numpy

    times = numpy.arange(int(seconds * rate_hz)) / rate_hz
    samples = (numpy.sin(2 * numpy.pi * 440 * times) * 8000).astype("<i2")
    content = io.BytesIO()
    with wave.open(content, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate_hz)
        file.writeframes(samples.tobytes())
    return content.getvalue()


def _save(root: str, name: str, model: Any, processor: Any) -> str:
    url = layout.model(name, root)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        storage.upload(Path(folder), url, {"kind": "model", "dataset": {}, "config": {}})
    return url
