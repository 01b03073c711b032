"""The training step in plain torch: accumulation, schedule, decay groups, sharding helpers."""

from __future__ import annotations

import copy
import itertools
import math
import subprocess
import sys

import pytest
import torch
from torch import nn

from manta.spec import OptimizerConfig
from manta.workloads import peak, step


class Bigram(nn.Module):
    """A next-token table: the smallest module whose forward returns a mean loss."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 16)
        self.bias = nn.Parameter(torch.zeros(16))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        logits = self.table(input_ids[:, :-1]) + self.bias
        return nn.functional.cross_entropy(logits.flatten(0, 1), input_ids[:, 1:].flatten())


def stepper(module: nn.Module, num_steps: int = 10, **hyper: float) -> step.Stepper:
    config = OptimizerConfig(**hyper)
    optimizer = step.build_optimizer(module, config)
    return step.Stepper(module, optimizer, config, num_steps=num_steps, device=torch.device("cpu"))


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 16, (8, 12), generator=torch.Generator().manual_seed(0))


def test_accumulated_micro_batches_step_as_one_big_batch_does(tokens: torch.Tensor) -> None:
    torch.manual_seed(0)
    whole = stepper(Bigram())
    parts = stepper(copy.deepcopy(whole.module))
    for number in range(3):
        one = whole.step(number, [tokens])
        four = parts.step(number, list(tokens.split(2)))
        assert float(four.loss) == pytest.approx(float(one.loss), rel=1e-5)
        assert float(four.grad_norm) == pytest.approx(float(one.grad_norm), rel=1e-4)
    torch.testing.assert_close(
        parts.module.state_dict(), whole.module.state_dict(), rtol=1e-4, atol=1e-6
    )


def test_loss_falls_on_a_repeated_batch(tokens: torch.Tensor) -> None:
    trained = stepper(Bigram(), num_steps=30, learning_rate=0.1, weight_decay=0)
    losses = [float(trained.step(number, [tokens]).loss) for number in range(30)]
    assert losses[-1] < 0.7 * losses[0]


def test_evaluation_weighs_every_row_once_and_changes_nothing(tokens: torch.Tensor) -> None:
    torch.manual_seed(0)
    trained = stepper(Bigram())
    before = copy.deepcopy(trained.module.state_dict())
    total, count = trained.evaluate([tokens[:5], tokens[5:], tokens[:0]])
    assert count == 8
    assert total / count == pytest.approx(trained.module(tokens).item(), rel=1e-5)
    torch.testing.assert_close(trained.module.state_dict(), before)


def test_schedule_warms_up_linearly_and_ends_at_the_floor() -> None:
    hyper = OptimizerConfig(learning_rate=1e-2, warmup_ratio=0.1, min_learning_rate_ratio=0.2)
    rates = [step.scheduled_learning_rate(number, 100, hyper) for number in range(100)]
    assert rates[0] == pytest.approx(1e-3)
    assert rates[9] == rates[10] == pytest.approx(1e-2)
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[10:]))
    assert rates[-1] == pytest.approx(2e-3)


def test_schedule_of_a_single_step_is_the_full_rate() -> None:
    hyper = OptimizerConfig(learning_rate=1e-2, warmup_ratio=0.05)
    assert step.scheduled_learning_rate(0, 1, hyper) == pytest.approx(1e-2)


def test_matrices_are_decayed_and_vectors_are_not() -> None:
    module = Bigram()
    groups = step.build_optimizer(module, OptimizerConfig(weight_decay=0.3)).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert decay == {id(module.table.weight): 0.3, id(module.bias): 0.0}


def test_gradients_are_clipped_to_the_configured_norm(tokens: torch.Tensor) -> None:
    trained = stepper(Bigram(), max_grad_norm=1e-3)
    result = trained.step(0, [tokens])
    squares = sum(float((p.grad**2).sum()) for p in trained.module.parameters())
    assert float(result.grad_norm) > 1e-3
    assert math.sqrt(squares) == pytest.approx(1e-3, rel=1e-2)


def test_bf16_is_computed_under_autocast_with_float32_weights(tokens: torch.Tensor) -> None:
    module = Bigram()
    optimizer = step.build_optimizer(module, OptimizerConfig())
    trained = step.Stepper(
        module,
        optimizer,
        OptimizerConfig(),
        num_steps=2,
        device=torch.device("cpu"),
        dtype=torch.bfloat16,
    )
    assert trained.step(0, [tokens]).loss.dtype == torch.float32
    assert {p.dtype for p in module.parameters()} == {torch.float32}


def test_step_code_imports_neither_ray_nor_transformers_nor_pydantic() -> None:
    code = (
        "import sys, manta.workloads.step;"
        "print({'ray', 'transformers', 'pydantic'} & set(sys.modules))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("name", "peak_flops"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peak_is_known_by_whole_device_names_only(name: str, peak_flops: float | None) -> None:
    assert peak.peak_flops(name) == peak_flops


def test_flops_of_a_token_add_attention_to_six_per_parameter() -> None:
    assert peak.flops_per_token(100, 2, 8, 16) == 6 * 100 + 12 * 2 * 8 * 16
