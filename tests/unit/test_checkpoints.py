"""Checkpoints in one process: what is saved comes back, and what is not whole is passed over."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from manta.errors import InputError
from manta.spec import OptimizerConfig
from manta.workloads import checkpoints, state, step

IDENTITY = {"model.hidden_size": 4, "seed": 0}


def build() -> tuple[nn.Module, torch.optim.Optimizer]:
    module = nn.Linear(4, 4)
    return module, step.build_optimizer(module, OptimizerConfig())


def train(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    (module(torch.randn(3, 4)) ** 2).mean().backward()
    optimizer.step()


def save(run: Path, number: int, module: nn.Module, optimizer: torch.optim.Optimizer) -> Path:
    folder = run / checkpoints.new_name(number)
    folder.mkdir(parents=True)
    state.write(folder, module, optimizer, number, IDENTITY)
    return folder


def test_training_goes_on_from_a_checkpoint_exactly_as_it_would_have(tmp_path: Path) -> None:
    module, optimizer = build()
    train(module, optimizer)
    save(tmp_path, 1, module, optimizer)
    train(module, optimizer)

    other, other_optimizer = build()
    found, skipped = checkpoints.newest(str(tmp_path))
    assert found is not None
    assert (found.step, skipped) == (1, [])
    state.restore(found, other, other_optimizer)
    train(other, other_optimizer)  # draws the same random batch
    torch.testing.assert_close(other.state_dict(), module.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("victim", ["__0_0.distcp", ".metadata", "random-0.pt", "manifest-0.json"])
@pytest.mark.parametrize("damage", ["cut", "gone", "flipped"])
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(
    tmp_path: Path, victim: str, damage: str
) -> None:
    module, optimizer = build()
    train(module, optimizer)
    save(tmp_path, 1, module, optimizer)
    file = save(tmp_path, 2, module, optimizer) / victim
    data = file.read_bytes()
    file.unlink()
    if damage == "cut":
        file.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        file.write_bytes(bytes([data[0] ^ 1]) + data[1:])

    found, skipped = checkpoints.newest(str(tmp_path))
    assert found is not None
    assert found.step == 1
    assert len(skipped) == 1
    assert victim in skipped[0]


def test_a_run_without_a_folder_has_no_checkpoint(tmp_path: Path) -> None:
    assert checkpoints.newest(str(tmp_path / "none")) == (None, [])


def test_a_checkpoint_of_another_model_is_refused_by_the_name_of_what_differs() -> None:
    old = checkpoints.Checkpoint("url", 1, 1, IDENTITY)
    with pytest.raises(InputError, match=r"model\.hidden_size was 4, now 8.*another name"):
        checkpoints.refuse_other(old, IDENTITY | {"model.hidden_size": 8}, "run", "url")


def test_sweeping_leaves_what_ray_registered_and_the_newest_whole_one(tmp_path: Path) -> None:
    module, optimizer = build()
    folders = [save(tmp_path, number, module, optimizer) for number in range(1, 5)]
    (folders[3] / ".metadata").unlink()
    registry = {"checkpoint_results": [{"checkpoint_dir_name": folders[0].name}]}
    (tmp_path / checkpoints.REGISTRY).write_text(json.dumps(registry))
    checkpoints.sweep(str(tmp_path), kept=checkpoints.newest(str(tmp_path))[0])
    assert [folder.exists() for folder in folders] == [True, False, True, False]


def test_a_registry_that_names_a_missing_checkpoint_is_dropped(tmp_path: Path) -> None:
    module, optimizer = build()
    save(tmp_path, 1, module, optimizer)
    registry = {"checkpoint_results": [{"checkpoint_dir_name": checkpoints.new_name(2)}]}
    (tmp_path / checkpoints.REGISTRY).write_text(json.dumps(registry))
    checkpoints.sweep(str(tmp_path), kept=checkpoints.newest(str(tmp_path))[0])
    assert not (tmp_path / checkpoints.REGISTRY).exists()
    assert checkpoints.newest(str(tmp_path))[0] is not None
