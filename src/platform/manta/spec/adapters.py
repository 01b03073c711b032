"""Which LoRA adapters an LLM application may load: `lora_config`, with Ray's own keys."""

from __future__ import annotations

from pydantic import Field

from manta.spec.loading import Spec


class AdaptersConfig(Spec):
    """Source: `LoraConfig` in ray/llm/_internal/serve/core/configs/llm_config.py of Ray 2.60."""

    dynamic_lora_loading_path: str = "adapters"
    """Folder with one folder for each adapter: under the storage root, or a URL."""
    max_num_adapters_per_replica: int = Field(16, ge=1)
    """Copies that a replica keeps on its disk; the least recently used one makes room."""
    download_timeout_s: float | None = Field(30, gt=0)
    """Longest time for one adapter's files to arrive."""
    max_download_tries: int = Field(3, ge=1)
