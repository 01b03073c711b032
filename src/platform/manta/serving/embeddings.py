"""A plain PyTorch model behind OpenAI's embeddings API, its requests batched as they come.

The model needs no download and no training: n-grams of words are hashed into a table of seeded
normal numbers and summed up. Sums of random vectors keep the angles between bags of n-grams (the
Johnson-Lindenstrauss lemma), so texts that share words and parts of words lie close. It knows no
synonyms. For another model put another `torch.nn.Module` in its place; the rest stays.
"""

from __future__ import annotations

import asyncio
import base64
import math
import re
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel
from ray import serve
from ray.serve import Application

from manta.serving.openai_app import arguments, guarded, openai_api
from manta.serving.openai_errors import bad_request
from manta.spec.apps import EmbedderConfig, EmbeddingsArgs

Vectors = npt.NDArray[np.float32]
"""Texts × dimensions, each row of length 1 (0 for a text without words)."""

_WORD = re.compile(r"\w+")
_LONG_WORD = 8
"""Letters from which on a word counts fully: short words are mostly grammar."""

api = openai_api("Embeddings")


class HashedNgrams(torch.nn.Module):  # type: ignore[misc]  # torch is not followed
    """Texts to unit vectors."""

    def __init__(self, config: EmbedderConfig) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(config.seed)
        table = torch.randn(config.num_buckets, config.num_dimensions, generator=generator)
        self.table = torch.nn.EmbeddingBag.from_pretrained(table, mode="sum")

    def forward(self, texts: Sequence[str]) -> torch.Tensor:
        """Shape (texts, dimensions)."""
        features = [list(_features(text, self.table.num_embeddings)) for text in texts]
        starts = np.cumsum([0, *map(len, features)])[:-1]
        rows = torch.tensor([row for each in features for row, _ in each], dtype=torch.long)
        weights = torch.tensor([weight for each in features for _, weight in each])
        sums = self.table(rows, torch.from_numpy(starts), per_sample_weights=weights.float())
        return torch.nn.functional.normalize(sums)


def _features(text: str, num_buckets: int) -> Iterator[tuple[int, float]]:
    """Row of the table and weight, for each word and each three letters of one."""
    for word in _WORD.findall(text.lower()):
        weight = min(1.0, len(word) / _LONG_WORD) ** 2
        yield zlib.crc32(word.encode()) % num_buckets, weight
        framed = f"<{word}>"
        parts = [framed[i : i + 3] for i in range(len(framed) - 2)]
        for part in parts:
            yield zlib.crc32(part.encode()) % num_buckets, weight / math.sqrt(len(parts))


class Embedder:
    """The model in a replica: others call `embed`, and calls that come together share a pass."""

    def __init__(self, config: EmbedderConfig) -> None:
        torch.set_num_threads(1)  # replicas are how this scales
        self._config = config
        self._model = HashedNgrams(config).eval()
        batched: Any = self._batched
        batched.set_max_batch_size(config.max_batch_size)
        batched.set_batch_wait_timeout_s(config.batch_wait_s)

    async def embed(self, texts: list[str]) -> Vectors:
        """Vectors of the texts, in their order."""
        vectors: Vectors = await self._batched(texts)
        return vectors

    @serve.batch  # type: ignore[untyped-decorator]
    async def _batched(self, requests: list[list[str]]) -> list[Vectors]:
        texts = [text for request in requests for text in request]
        vectors = await asyncio.to_thread(self._encode, texts)
        ends = np.cumsum([len(request) for request in requests])
        return np.split(vectors, ends[:-1])

    def _encode(self, texts: list[str]) -> Vectors:
        with torch.inference_mode():
            vectors: Vectors = self._model(texts).numpy()
        return vectors


class EmbeddingRequest(BaseModel):
    """Body of POST /v1/embeddings."""

    model: str | None = None
    input: str | list[str]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    user: str | None = None


class Embeddings(Embedder):
    """The routes. Ray makes one object of it in each replica."""

    @api.get("/v1/models")
    async def models(self) -> dict[str, Any]:
        """The one model."""
        one = {"id": self._config.model_id, "object": "model", "created": 0, "owned_by": "manta"}
        return {"object": "list", "data": [one]}

    @api.post("/v1/embeddings")
    async def embeddings(self, request: EmbeddingRequest) -> dict[str, Any]:
        """As OpenAI has it."""
        texts = [request.input] if isinstance(request.input, str) else request.input
        if not texts:
            raise bad_request("`input` is empty", "input")
        if request.model not in (None, self._config.model_id):
            raise bad_request(f"the model here is `{self._config.model_id}`", "model")
        if request.dimensions not in (None, self._config.num_dimensions):
            raise bad_request(f"there are {self._config.num_dimensions}", "dimensions")
        vectors = await self.embed(texts)
        entries = [
            {"object": "embedding", "index": i, "embedding": _written(v, request.encoding_format)}
            for i, v in enumerate(vectors)
        ]
        num_words = sum(len(_WORD.findall(text)) for text in texts)
        usage = {"prompt_tokens": num_words, "total_tokens": num_words}
        return {
            "object": "list",
            "model": self._config.model_id,
            "data": entries,
            "usage": usage,
        }


def _written(vector: Vectors, encoding: str) -> str | list[float]:
    if encoding == "base64":  # what OpenAI's client asks for unless told otherwise
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return [float(number) for number in vector]


def build_app(args: dict[str, Any]) -> Application:
    """The application of `serve_apps/embeddings.yaml`. Raises InputError for wrong arguments."""
    config = arguments(EmbeddingsArgs, args, "serve_apps/embeddings.yaml")
    deployment = serve.deployment(guarded(api, config.guard)(Embeddings), max_ongoing_requests=256)
    return deployment.bind(config)
