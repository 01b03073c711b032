"""Ray's vLLM stage for models in Manta's storage: the code that runs in the engine's actor."""

from __future__ import annotations

from typing import Any

from ray.llm._internal.batch.stages.vllm_engine_stage import vLLMEngineStageUDF

from manta import storage


class StorageEngine(vLLMEngineStageUDF):  # type: ignore[misc]
    """The engine of `ray.data.llm`, with a verified copy of the model on its own node."""

    def __init__(self, *args: Any, model_url: str, **kwargs: Any) -> None:
        if storage.exists(storage.join(model_url, storage.SEAL)):
            kwargs["model"] = str(storage.cached_copy(model_url, f"model {model_url}"))
        super().__init__(*args, **kwargs)

    def __del__(self) -> None:
        # vLLM ends its engine process before the task that listens to it, and then reports the
        # end of every successful run as an error with a traceback.
        engine = getattr(getattr(self, "llm", None), "engine", None)
        if (listener := getattr(engine, "output_handler", None)) is not None:
            listener.get_loop().call_soon_threadsafe(listener.cancel)
        super().__del__()
