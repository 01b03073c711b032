"""Whether the language models of a Serve config fit what they run on, and what would help."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from manta.check.serve_arguments import is_llm, llm_configs
from manta.plan.clusters import Cluster
from manta.sizing.accelerators import ACCELERATORS, GIB, Accelerator, accelerators_of
from manta.sizing.engine import Engine, engine_of
from manta.sizing.fit import Fit, fit
from manta.sizing.model import Model, NotKnown
from manta.sizing.published import find_model, read_config
from manta.spec import load
from manta.spec.serve import Application, ServeSpec

ConfigOf = Callable[[str], Path | None]
"""`model_source` → its config.json, where that is at hand."""
SHORTEST = 1024
"""Tokens: a shorter context is no advice."""
_STEP = 256
_TENSOR_PARALLEL = (2, 4, 8)
"""Within one node, where accelerators are joined closely enough."""


@dataclass(frozen=True, kw_only=True)
class ModelPlan:
    """One engine of an application."""

    application: str
    role: str
    """`prefill` or `decode` where the two are apart, else empty."""
    model_id: str
    source: str
    accelerator: str | None
    """None: a CPU."""
    fit: Fit | None
    unknown: str = ""
    """Why there is no `fit`."""
    changes: tuple[str, ...] = ()
    """Lines of the file, each of which alone would make it fit."""
    notes: tuple[str, ...] = ()


def plan_models(
    file: str | Path,
    *,
    root: Path,
    config_of: ConfigOf = lambda source: None,
    clusters: Sequence[Cluster] = (),
    accelerators: Sequence[str] = (),
) -> tuple[ModelPlan, ...]:
    """The engines of all LLM applications of a Serve config, in its order.

    Args:
        file: the Serve config.
        root: working directory, whose facts about published models are read.
        config_of: asked before anything else for the config.json of a `model_source`.
        clusters: name the accelerator where the file does not and they have but one kind.
        accelerators: in place of the file's, each in turn.

    Raises:
        InvalidSpec: the file is no Serve config.
    """
    plans: list[ModelPlan] = []
    for application in filter(is_llm, load(file, ServeSpec).applications):
        plans += [
            _plan(application.name, str(path[-1]), {**config, **other}, root, config_of, clusters)
            for path, config in llm_configs((), application)
            for other in [{"accelerator_type": name} for name in accelerators] or [{}]
        ]
        plans += _elsewhere(application)
    return tuple(plans)


def _elsewhere(application: Application) -> Iterator[ModelPlan]:
    """LLM configs that are named by a path, which Ray follows on the cluster and we do not."""
    listed = application.args.get("llm_configs")
    for entry in listed if isinstance(listed, list) else ():
        if isinstance(entry, str):
            reason = NotKnown("a file of its own; write its content in place of its path")
            yield _unknown(application.name, "", entry, reason)


def _plan(
    application: str,
    place: str,
    config: Mapping[str, Any],
    root: Path,
    config_of: ConfigOf,
    clusters: Sequence[Cluster],
) -> ModelPlan:
    role = place.removesuffix("_config") if place.endswith("_config") else ""
    try:
        engine = engine_of(config)
    except NotKnown as reason:
        loading = config.get("model_loading_config")
        named = loading.get("model_id", "?") if isinstance(loading, Mapping) else "?"
        return _unknown(application, role, str(named), reason)
    engine, notes = _with_accelerator(engine, clusters)
    try:
        model = _model(engine.model_source, root, config_of)
        found = fit(model, engine, _accelerator(engine))
    except NotKnown as reason:
        return replace(
            _unknown(application, role, engine.model_id, reason),
            source=engine.model_source,
            accelerator=engine.accelerator,
            notes=notes,
        )
    if engine.not_counted:
        notes += (f"not in the figures: {', '.join(engine.not_counted)}",)
    return ModelPlan(
        application=application,
        role=role,
        model_id=engine.model_id,
        source=engine.model_source,
        accelerator=engine.accelerator,
        fit=found,
        changes=() if found.holds_all else tuple(_changes(model, found)),
        notes=notes,
    )


def _unknown(application: str, role: str, model_id: str, reason: NotKnown) -> ModelPlan:
    return ModelPlan(
        application=application,
        role=role,
        model_id=model_id,
        source=model_id,
        accelerator=None,
        fit=None,
        unknown=str(reason),
    )


def _model(source: str, root: Path, config_of: ConfigOf) -> Model:
    at_hand = config_of(source)
    return read_config(at_hand) if at_hand else find_model(source, root)


def _with_accelerator(
    engine: Engine, clusters: Sequence[Cluster]
) -> tuple[Engine, tuple[str, ...]]:
    """The engine on an accelerator with one size, and what was assumed for that."""
    notes: tuple[str, ...] = ()
    if engine.accelerator == "?":
        kinds = {kind for cluster in clusters for kind in _kinds(cluster)}
        if len(kinds) == 1:
            engine = replace(engine, accelerator=kinds.pop())
            notes = (f"accelerator_type is not given; {engine.accelerator} is all there is",)
    sizes = accelerators_of(engine.accelerator or "")
    if len(sizes) > 1:
        small, others = sizes[0].name, ", ".join(each.name for each in sizes[1:])
        notes += (
            f"{engine.accelerator} comes in several sizes; reckoned as {small}, not {others}",
        )
    if sizes:
        engine = replace(engine, accelerator=sizes[0].name)
    return engine, notes


def _kinds(cluster: Cluster) -> Iterator[str]:
    for node in cluster.node_types:
        named = [r.partition(":")[2] for r in node.resources if r.startswith("accelerator_type:")]
        label = node.labels.get("ray.io/accelerator-type")
        yield from named or ([label] if label else [])


def _accelerator(engine: Engine) -> Accelerator | None:
    if engine.accelerator is None:
        return None
    if engine.accelerator == "?":
        raise NotKnown("the file does not say on which accelerator; write `accelerator_type: …`")
    found = ACCELERATORS.get(engine.accelerator)
    if found is None:
        known = ", ".join(ACCELERATORS)
        raise NotKnown(f"the memory of `{engine.accelerator}` is not known (known: {known})")
    return found


# --- what would help -------------------------------------------------------------------------


def _changes(model: Model, found: Fit) -> Iterator[str]:
    """Single lines with which everything that is asked for fits, the cheapest first."""
    engine = found.engine
    if found.starts:
        yield f"max_num_seqs: {found.num_sequences}"
    shorter = _longest(model, found, found.wanted_sequences)
    if shorter:
        yield f"max_model_len: {shorter}"
    if found.accelerator is None:
        needed = found.wanted_sequences * found.cache.bytes_per_sequence
        yield f'VLLM_CPU_KVCACHE_SPACE: "{-(-needed // GIB)}"'
        return
    for size in _TENSOR_PARALLEL:
        wider = replace(engine, tensor_parallel=size)
        if size > engine.tensor_parallel and _holds(model, wider):
            yield f"tensor_parallel_size: {size}"
            break
    for other in ACCELERATORS.values():
        larger = other.memory_bytes > found.accelerator.memory_bytes
        if larger and other.is_ray_name and _holds(model, replace(engine, accelerator=other.name)):
            yield f"accelerator_type: {other.name}"
            break


def _holds(model: Model, engine: Engine) -> bool:
    try:
        return fit(model, engine, _accelerator(engine)).holds_all
    except NotKnown:  # cannot be cut like that
        return False


def _longest(model: Model, found: Fit, num_sequences: int) -> int | None:
    """The longest context at which so many sequences fit; None if that is no use."""

    def fits(length: int) -> bool:
        shorter = replace(found.engine, max_model_len=length)
        return fit(model, shorter, found.accelerator).num_sequences >= num_sequences

    low, high = 0, found.max_model_len // _STEP
    while low < high:  # `low` fits (none always does), what is above `high` does not
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle * _STEP) else (low, middle - 1)
    return low * _STEP if low * _STEP >= SHORTEST else None


# --- in words ------------------------------------------------------------------------------


def words(plan: ModelPlan) -> Iterator[str]:
    """The plan of one engine, a line for each thing."""
    role = f" {plan.role}" if plan.role else ""
    yield f"{plan.application}: {plan.model_id}{role} {_where(plan)}".rstrip()
    if plan.fit is None:
        yield f"  Not known: {plan.unknown}"
    else:
        yield from (f"  {line}" for line in _lines(plan, plan.fit))
    for note in plan.notes:
        yield f"  Note: {note}"


def _where(plan: ModelPlan) -> str:
    if plan.accelerator is None:
        return "on CPU" if plan.fit else ""
    engine = plan.fit.engine if plan.fit else None
    if engine is None or engine.num_accelerators == 1:
        return f"on {plan.accelerator}"
    split = [f"tensor {engine.tensor_parallel}", f"pipeline {engine.pipeline_parallel}"]
    if engine.expert_parallel:
        split.append(f"experts over {engine.num_expert_ranks}")
    return f"on {engine.num_accelerators} × {plan.accelerator} ({', '.join(split)}), for each"


def _lines(plan: ModelPlan, found: Fit) -> Iterator[str]:
    active = found.num_active_parameters
    chosen = f" ({active:,} active)" if active != found.num_parameters else ""
    yield (
        f"Weights: {_gib(found.weights_bytes)} GiB; "
        f"{found.num_parameters:,} parameters{chosen} in all"
    )
    yield _cache(found)
    yield _verdict(plan, found)
    if (
        found.starts
        and found.decode_s_per_token is not None
        and found.full_decode_s_per_token is not None
    ):
        alone, together = found.decode_s_per_token, found.full_decode_s_per_token
        num = found.num_together
        yield (
            f"Decode floor: {alone * 1e3:.1f} ms a token alone ({1 / alone:,.0f} tokens/s); "
            f"{together * 1e3:.1f} ms with {num} of full length ({num / together:,.0f} tokens/s)"
        )


def _cache(found: Fit) -> str:
    each = f"KV cache: {found.cache.bytes_per_token / 1024:.4g} KiB a token"
    if found.memory_bytes is None:
        need = found.weights_bytes + found.allowance_bytes + found.cache_bytes
        return f"{each}; {_gib(found.cache_bytes)} GiB set; {_gib(need)} GiB of memory in all"
    limit, allowed = _gib(found.memory_bytes), _gib(found.allowance_bytes)
    if found.engine.cache_bytes_are_set:
        return f"{each}; {_gib(found.cache_bytes)} GiB set"
    over = found.cache_bytes < 0
    left = f"{_gib(abs(found.cache_bytes))} GiB {'too little' if over else 'left'}"
    return f"{each}; {left} of {limit} GiB, with {allowed} GiB allowed for all else"


def _verdict(plan: ModelPlan, found: Fit) -> str:
    asked = f"; {found.engine.max_num_seqs} asked for" if found.engine.max_num_seqs else ""
    of_length = f"of {found.max_model_len:,} tokens"
    if found.holds_all:
        return f"Fits: {found.num_sequences} sequences {of_length} at once{asked}"
    fix = (
        f"; write {' or '.join(f'`{change}`' for change in plan.changes)}" if plan.changes else ""
    )
    if found.starts:
        return f"Starts: {found.num_sequences} sequences {of_length} at once{asked}{fix}"
    short = f"{_gib(found.short_bytes)} GiB short of one sequence {of_length}"
    return f"Does not fit: {short}{fix or '; no single line helps'}"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f}"


def as_json(plan: ModelPlan) -> dict[str, Any]:
    """The plan as plain values; bytes are of one accelerator, seconds of one token."""
    found = plan.fit
    told: dict[str, Any] = {k: v for k, v in asdict(plan).items() if k != "fit"}
    told["fits"] = None if found is None else found.holds_all
    if found is None:
        return told
    return told | {
        "starts": found.starts,
        "num_accelerators": found.engine.num_accelerators,
        "num_parameters": found.num_parameters,
        "num_active_parameters": found.num_active_parameters,
        "max_model_len": found.max_model_len,
        "max_num_seqs": found.max_num_seqs,
        "memory_bytes": found.memory_bytes,
        "weights_bytes": found.weights_bytes,
        "allowance_bytes": found.allowance_bytes,
        "cache_bytes": found.cache_bytes,
        "cache_bytes_per_token": found.cache.bytes_per_token,
        "cache_bytes_per_sequence": found.cache.bytes_per_sequence,
        "num_sequences": found.num_sequences,
        "num_cache_tokens": found.num_cache_tokens,
        "short_bytes": found.short_bytes,
        "decode_s_per_token": found.decode_s_per_token,
        "num_together": found.num_together,
        "full_decode_s_per_token": found.full_decode_s_per_token,
    }
