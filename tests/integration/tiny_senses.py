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
"""Of any picture: it is scaled to the size above and cut into patches of 14 pixels."""


def write_eyes(root: str, name: str) -> str:
    """A LLaVA: a CLIP tower, a projector and the language model of `tiny_model`, as small."""
    import torch
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    tokenizer = tiny_model.tokenizer(["<|end|>", "<image>", "<pad>"])
    tokenizer.pad_token = "<pad>"
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
        "{% for part in m['content'] %}{% if part['type'] == 'image' %}<image>{% else %}"
        "{{ part['text'] }}{% endif %}{% endfor %}{% endif %}\n{% endfor %}"
    )
    processor = LlavaProcessor(
        CLIPImageProcessorPil(
            size={"shortest_edge": IMAGE_SIZE},
            crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        ),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(
                hidden_size=64,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=IMAGE_SIZE,
                patch_size=14,
                projection_dim=64,
            ),
            text_config=LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=64,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=2,
                max_position_embeddings=256,
                bos_token_id=0,
                eos_token_id=0,
            ),
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        )
    )
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
