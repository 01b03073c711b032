"""Does a language model fit the accelerator that its Serve config names? Only what is certain."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from manta.check.rules import Fault, File, Project, rule
from manta.check.serve import applications
from manta.check.serve_arguments import is_llm, llm_configs
from manta.sizing.accelerators import GIB, accelerators_of
from manta.sizing.engine import Engine, engine_of
from manta.sizing.fit import certainly_too_much, fit
from manta.sizing.model import Model, NotKnown
from manta.sizing.published import find_model
from manta.spec.loading import Path_


@rule("serve-llm-memory", "error", "serve")
def llm_memory(file: File, project: Project) -> Iterator[Fault]:
    """vLLM loads the weights for minutes, finds no room for one sequence, and gives up."""
    for path, application in applications(file):
        for at, config in llm_configs(path, application) if is_llm(application) else ():
            try:
                engine = engine_of(config)
                fault = _fault(at, config, engine, project.root)
            except NotKnown:
                continue  # `manta plan` says what is not known
            if fault:
                yield fault


def _fault(at: Path_, config: dict[str, Any], engine: Engine, root: Path) -> Fault | None:
    if engine.accelerator is None:
        return _on_cpu(at, find_model(engine.model_source, root), engine)
    sizes = accelerators_of(engine.accelerator)
    if not sizes:
        return None
    model = find_model(engine.model_source, root)
    largest = sizes[-1]  # the name may mean a smaller one: that is not certain
    short = certainly_too_much(model, engine, largest)
    if not short:
        return None
    found = fit(model, engine, largest)
    weights, cache = found.weights_bytes / GIB, found.cache.bytes_per_sequence / GIB
    what = (
        f"{engine.model_id} does not fit {_times(engine, largest.name)}: weights "
        f"{weights:.1f} GiB and {cache:.1f} GiB of KV cache for one sequence of "
        f"{found.max_model_len:,} tokens are {short / GIB:.1f} GiB too much for each"
    )
    return Fault(_place(at, config), what, "`manta plan` of this file says what would fit")


def _on_cpu(at: Path_, model: Model, engine: Engine) -> Fault | None:
    found = fit(model, engine, None)
    if found.starts:
        return None
    what = (
        f"VLLM_CPU_KVCACHE_SPACE holds {found.cache_bytes / GIB:g} GiB, one sequence of "
        f"{found.max_model_len:,} tokens takes {found.cache.bytes_per_sequence / GIB:.1f}"
    )
    place = (*at, "runtime_env", "env_vars", "VLLM_CPU_KVCACHE_SPACE")
    return Fault(place, what, "raise it, or lower max_model_len")


def _times(engine: Engine, name: str) -> str:
    number = engine.num_accelerators
    return name if number == 1 else f"{number} × {name}"


def _place(at: Path_, config: dict[str, Any]) -> Path_:
    """The line that decides: the context length where it is given, else the accelerator."""
    arguments = config.get("engine_kwargs")
    if isinstance(arguments, dict) and "max_model_len" in arguments:
        return (*at, "engine_kwargs", "max_model_len")
    return (*at, "accelerator_type")
