"""What `jobs/train.py` and `jobs/tune.py` read."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from manta.spec.data import Name
from manta.spec.loading import Spec


class ModelConfig(Spec):
    """A Llama-architecture causal language model; names as in transformers' LlamaConfig."""

    hidden_size: int = Field(256, ge=8)
    intermediate_size: int = Field(688, ge=8)
    num_hidden_layers: int = Field(4, ge=1)
    num_attention_heads: int = Field(4, ge=1)
    num_key_value_heads: int = Field(2, ge=1)
    max_position_embeddings: int = Field(1024, ge=8)
    rope_theta: float = Field(10_000.0, gt=0)
    tie_word_embeddings: bool = True

    @model_validator(mode="after")
    def _heads_divide(self) -> ModelConfig:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_attention_heads}; choose heads that divide it"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}; choose a divisor"
            )
        return self


class OptimizerConfig(Spec):
    """AdamW with linear warm-up and cosine decay."""

    learning_rate: float = Field(2e-3, gt=0, lt=1)
    min_learning_rate_ratio: float = Field(0.1, ge=0, le=1)
    """The schedule ends at this share of `learning_rate`."""
    warmup_ratio: float = Field(0.05, ge=0, lt=1)
    """Share of the steps that warm up."""
    weight_decay: float = Field(0.1, ge=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    max_grad_norm: float = Field(1.0, gt=0)


class ScalingConfig(Spec):
    """How many Ray Train workers, and what each holds."""

    num_workers: int = Field(2, ge=1)
    cpus_per_worker: float = Field(1, gt=0)
    gpus_per_worker: float = Field(0, ge=0)
    parallel: Literal["ddp", "fsdp2"] = "ddp"
    max_failures: int = Field(3, ge=-1)
    """Worker-group failures survived before the run fails; -1 is without limit."""


class TrainConfig(Spec):
    """One training run. The exported model has the run's name."""

    name: Name
    dataset: str
    """`NAME` (its newest version) or `NAME@VERSION`."""
    tuned: Name | None = None
    """Take the best parameters of this `jobs/tune.py` run over the ones below."""
    num_steps: int = Field(ge=1)
    global_batch_size: int = Field(32, ge=1)
    """Sequences an optimizer step, over all workers."""
    micro_batch_size: int = Field(8, ge=1)
    """Sequences a worker holds at once; the rest is gradient accumulation."""
    seed: int = 0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`auto` is bf16 on an accelerator that has it, else fp32."""
    checkpoint_every_steps: int = Field(50, ge=1)
    num_checkpoints_kept: int = Field(2, ge=1)
    validate_every_steps: int = Field(50, ge=1)
    num_validation_sequences: int = Field(64, ge=1)
    log_every_steps: int = Field(10, ge=1)
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    scaling: ScalingConfig = ScalingConfig()

    @model_validator(mode="after")
    def _batch_divides(self) -> TrainConfig:
        per_pass = self.scaling.num_workers * self.micro_batch_size
        if self.global_batch_size % per_pass:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is not a multiple of "
                f"scaling.num_workers × micro_batch_size = {per_pass}; write e.g. "
                f"global_batch_size: {-(-self.global_batch_size // per_pass) * per_pass}"
            )
        return self

    @property
    def num_accumulation_steps(self) -> int:
        """Forward and backward passes a worker makes for one optimizer step."""
        return self.global_batch_size // (self.scaling.num_workers * self.micro_batch_size)


class SearchDimension(Spec):
    """One searched parameter: exactly one of the three forms."""

    log_uniform: tuple[float, float] | None = None
    uniform: tuple[float, float] | None = None
    choice: tuple[float | int | str | bool, ...] | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> SearchDimension:
        forms = [self.log_uniform, self.uniform, self.choice]
        if sum(form is not None for form in forms) != 1:
            raise ValueError("give exactly one of log_uniform, uniform, choice")
        for low_high in (self.log_uniform, self.uniform):
            if low_high is not None and low_high[0] >= low_high[1]:
                raise ValueError(f"low {low_high[0]} is not below high {low_high[1]}; swap them")
        if self.log_uniform is not None and self.log_uniform[0] <= 0:
            raise ValueError("log_uniform needs a low above 0; e.g. [1.0e-4, 1.0e-2]")
        return self


class TuneConfig(Spec):
    """A search over the training configuration, on short runs of the same code."""

    name: Name
    base: str
    """Path of the training config that each trial varies, relative to the working directory."""
    search: dict[str, SearchDimension] = Field(min_length=1)
    """Dotted key of the training config → what to try."""
    num_trials: int = Field(8, ge=1)
    num_steps: int = Field(40, ge=1)
    """Optimizer steps of a full trial; ASHA stops the weak ones earlier."""
    grace_steps: int = Field(10, ge=1)
    """Steps that every trial may take before ASHA may stop it."""
    reduction_factor: int = Field(2, ge=2)
    max_concurrent_trials: int = Field(2, ge=1)
    cpus_per_trial: float = Field(1, gt=0)
    gpus_per_trial: float = Field(0, ge=0)
    seed: int = 0

    @model_validator(mode="after")
    def _grace_fits(self) -> TuneConfig:
        if self.grace_steps > self.num_steps:
            raise ValueError(
                f"grace_steps {self.grace_steps} is over num_steps {self.num_steps}; "
                "a trial must be able to reach it"
            )
        return self
