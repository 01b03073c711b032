"""Where a model's sizes come from when no network may be asked: its folder, or known facts."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from manta.sizing.model import Model, NotKnown, model_of

FACTS = Path("configs", "models", "facts")
"""Published models: a file each, with `models` (Hub ids), `config` and `source`."""
MAX_CONFIG_BYTES = 2**20


def find_model(source: str, root: Path) -> Model:
    """The model that `model_source` names: a folder with a config.json, or a published one.

    Args:
        source: as a Serve config has it.
        root: working directory; its `configs/models/facts` is read, else this checkout's.

    Raises:
        NotKnown: it is neither, or its config.json says something that is not known here.
    """
    if source.startswith(("/", "~", "./", "../")):
        return read_config(Path(os.path.expanduser(source)) / "config.json")  # noqa: PTH111
    config = _facts(_folder(root)).get(source)
    if config is None:
        raise NotKnown(
            f"no facts about `{source}` here; give its config.json: --model-config {source}=FILE"
        )
    return model_of(config)


def read_config(file: Path) -> Model:
    """The model of one config.json. Raises NotKnown if it cannot be read or is not understood."""
    return model_of(_json(file))


def _folder(root: Path) -> Path:
    checkout = Path(__file__).parents[4]
    return next((r / FACTS for r in (root, checkout) if (r / FACTS).is_dir()), root / FACTS)


@functools.cache
def _facts(folder: Path) -> Mapping[str, Mapping[str, Any]]:
    """Hub id → config."""
    found = {}
    for file in sorted(folder.glob("*.json")):
        facts = _json(file)
        config, models = facts.get("config"), facts.get("models")
        if not isinstance(config, dict) or not isinstance(models, list):
            raise NotKnown(f"{file}: needs `models`, a list, and `config`, a mapping")
        found.update(dict.fromkeys(map(str, models), config))
    return found


def _json(file: Path) -> dict[str, Any]:
    try:
        if not file.is_file():  # a pipe would never end
            raise NotKnown(f"there is no {file}")
        with file.open("rb") as stream:
            value = json.loads(stream.read(MAX_CONFIG_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or "not JSON"
        raise NotKnown(f"{file} cannot be read: {reason}") from None
    if not isinstance(value, dict):
        raise NotKnown(f"{file} is not a JSON object")
    return value
