"""Rules over the arguments that a Serve config gives to an application's builder."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from manta.check.facts.serving import LLM_KEYS, VLLM_ENGINE_KEYS
from manta.check.rules import (
    Fault,
    File,
    Project,
    did_you_mean,
    misspelt_keys,
    nearest,
    rule,
    unknown_keys,
)
from manta.check.serve import applications
from manta.spec.guard import CacheConfig, GuardConfig, Limits, PromptLogConfig
from manta.spec.loading import Path_
from manta.spec.serve import SPLIT, Application

_GROUP_KEYS = frozenset({"bundles", "strategy", "bundle_per_worker"})
_LLM = {
    "": LLM_KEYS["LLMServingArgs"] | {"guard", *SPLIT},
    "guard": frozenset(GuardConfig.model_fields),
    "guard.default_limits": frozenset(Limits.model_fields),
    "guard.cache": frozenset(CacheConfig.model_fields),
    "guard.log_prompts": frozenset(PromptLogConfig.model_fields),
    "ingress_cls_config": LLM_KEYS["IngressClsConfig"],
    **{
        f"{entry}{below}": keys
        for entry in ("llm_configs", *SPLIT)
        for below, keys in (
            ("", LLM_KEYS["LLMConfig"]),
            (".model_loading_config", LLM_KEYS["ModelLoadingConfig"]),
            (".lora_config", LLM_KEYS["LoraConfig"]),
            (".placement_group_config", _GROUP_KEYS),
        )
    },
}


def is_llm(application: Application) -> bool:
    """Whether ray.serve.llm's OpenAI builder, or a wrapper that takes its arguments, is named."""
    return application.import_path.endswith((":build_openai_app", ".build_openai_app"))


def llm_configs(path: Path_, application: Application) -> Iterator[tuple[Path_, dict[str, Any]]]:
    """Each LLM config that stands in the file, with its path; others are files of their own."""
    configs = application.args.get("llm_configs")
    for i, config in enumerate(configs if isinstance(configs, list) else ()):
        if isinstance(config, dict):
            yield (*path, "args", "llm_configs", i), config
    for key in SPLIT:
        if isinstance(config := application.args.get(key), dict):
            yield (*path, "args", key), config


@rule("serve-llm-argument", "error", "serve")
def llm_argument(file: File, project: Project) -> Iterator[Fault]:
    """ray.serve.llm refuses arguments that it does not know, when the app is already building."""
    for path, application in applications(file):
        if is_llm(application):
            at = (*path, "args")
            yield from misspelt_keys(application.args, at, _LLM)
            yield from unknown_keys(application.args, at, _LLM)


@rule("serve-llm-incomplete", "error", "serve")
def llm_incomplete(file: File, project: Project) -> Iterator[Fault]:
    """ray.serve.llm needs to know which model."""
    for path, application in applications(file):
        if not is_llm(application):
            continue
        split = [key for key in SPLIT if key in application.args]
        if "llm_configs" not in application.args and not split:
            yield Fault((*path, "args"), "`llm_configs` is missing", "add `llm_configs: [ … ]`")
        for key in SPLIT if split else ():
            if key not in application.args:
                fix = f"add `{key}: …`"
                yield Fault((*path, "args"), f"`{key}` is missing beside `{split[0]}`", fix)
        for at, config in llm_configs(path, application):
            loading = config.get("model_loading_config")
            if not isinstance(loading, dict):
                fix = "add `model_loading_config: {model_id: …}`"
                yield Fault(at, "`model_loading_config` is missing", fix)
            elif "model_id" not in loading:
                where = (*at, "model_loading_config")
                yield Fault(where, "`model_id` is missing", "add `model_id: …`")


@rule("serve-engine-argument", "error", "serve")
def engine_argument(file: File, project: Project) -> Iterator[Fault]:
    """vLLM refuses engine arguments that it does not know, minutes after the replica started."""
    for at, name in _engine_arguments(file):
        if nearest(name, VLLM_ENGINE_KEYS):
            fix = did_you_mean(name, VLLM_ENGINE_KEYS)
            yield Fault((*at, name), f"vLLM has no engine argument `{name}`", fix)


@rule("serve-engine-unusual", "warning", "serve")
def engine_unusual(file: File, project: Project) -> Iterator[Fault]:
    """The vLLM of the lock has no such engine argument."""
    for at, name in _engine_arguments(file):
        if not nearest(name, VLLM_ENGINE_KEYS):
            yield Fault((*at, name), f"vLLM has no engine argument `{name}`", "remove it")


def _engine_arguments(file: File) -> Iterator[tuple[Path_, str]]:
    """Engine arguments of vLLM apps that vLLM does not have."""
    for path, application in applications(file):
        for at, config in llm_configs(path, application) if is_llm(application) else ():
            arguments = config.get("engine_kwargs")
            if config.get("llm_engine", "vLLM") == "vLLM" and isinstance(arguments, dict):
                for name in arguments.keys() - VLLM_ENGINE_KEYS:
                    yield (*at, "engine_kwargs"), name


@rule("serve-engine-bundles", "error", "serve")
def engine_bundles(file: File, project: Project) -> Iterator[Fault]:
    """The engine waits for ever for the GPUs that its placement group does not have."""
    for path, application in applications(file):
        for at, config in llm_configs(path, application) if is_llm(application) else ():
            group, workers = config.get("placement_group_config"), num_engine_workers(config)
            listed = group.get("bundles") if isinstance(group, dict) else None
            if not isinstance(listed, list) or workers is None:
                continue
            gpus = [bundle.get("GPU") or 0 for bundle in listed if isinstance(bundle, dict)]
            if any(gpus) and all(isinstance(n, int | float) for n in gpus) and sum(gpus) < workers:
                what = f"the bundles have {sum(gpus):g} GPU, the engine runs on {workers}"
                fix = f"list {workers} bundles, or lower tensor_parallel_size"
                yield Fault((*at, "placement_group_config"), what, fix)


def num_engine_workers(config: dict[str, Any]) -> int | None:
    """Accelerators that one engine runs on; None if the arguments are no numbers."""
    arguments = config.get("engine_kwargs") or {}
    if not isinstance(arguments, dict):
        return None
    tensor = arguments.get("tensor_parallel_size", 1)
    pipeline = arguments.get("pipeline_parallel_size", 1)
    if not isinstance(tensor, int) or not isinstance(pipeline, int):
        return None
    return tensor * pipeline


@rule("serve-builder", "error", "serve")
def builder(file: File, project: Project) -> Iterator[Fault]:
    """The builder is in the working directory, and does not take what the file gives it."""
    for path, application in applications(file):
        module, _, name = application.import_path.partition(":")
        tree = _module(project.root, module)
        if tree is None or not name or is_llm(application):
            continue
        if name.partition(".")[0] not in _defined(tree):
            fix = did_you_mean(name, _defined(tree))
            yield Fault((*path, "import_path"), f"{module} defines no `{name}`", fix)
        else:
            yield from _arguments(tree, name, (*path, "args"), application.args)


def _module(root: Path, module: str) -> ast.Module | None:
    """The parsed source of a module in the working directory; None if it is not there."""
    if not all(part.isidentifier() for part in module.split(".")):
        return None
    source = root.joinpath(*module.split(".")).with_suffix(".py")
    try:
        return ast.parse(source.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError, RecursionError):
        return None


def _defined(tree: ast.Module) -> frozenset[str]:
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        else:
            names |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    return frozenset(names)


def _arguments(tree: ast.Module, name: str, path: Path_, given: dict[str, Any]) -> Iterable[Fault]:
    """Keys that a builder's annotated pydantic model, in the same module, does not have."""
    found = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    parameters = found[name].args.args if name in found else []
    annotation = parameters[0].annotation if parameters else None
    if not isinstance(annotation, ast.Name):
        return
    for node in tree.body:
        if not isinstance(node, ast.ClassDef) or node.name != annotation.id:
            continue
        if [ast.unparse(base) for base in node.bases] not in (
            ["BaseModel"],
            ["pydantic.BaseModel"],
        ):
            continue  # inherits fields that cannot be seen here
        fields = [item.target for item in node.body if isinstance(item, ast.AnnAssign)]
        known = frozenset(target.id for target in fields if isinstance(target, ast.Name))
        for key in given.keys() - known:
            fix = did_you_mean(key, known) or f"it takes {', '.join(sorted(known))}"
            yield Fault((*path, key), f"`{name}` takes no argument `{key}`", fix)
