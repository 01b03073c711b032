"""What users write, as frozen models. Every message about it names file and line."""

from manta.spec.data import STDLIB, PrepareConfig, TokenizerConfig
from manta.spec.inference import AskConfig, EvaluateConfig, GenerateConfig, SamplingConfig
from manta.spec.jobs import (
    WORKLOADS,
    JobSpec,
    PipelineSpec,
    Resources,
    Retry,
    Step,
    Work,
    script_of,
)
from manta.spec.loading import Document, Spec, load, read, validate
from manta.spec.training import (
    ModelConfig,
    OptimizerConfig,
    ScalingConfig,
    SearchDimension,
    TrainConfig,
    TuneConfig,
)

__all__ = [
    "STDLIB",
    "WORKLOADS",
    "AskConfig",
    "Document",
    "EvaluateConfig",
    "GenerateConfig",
    "JobSpec",
    "ModelConfig",
    "OptimizerConfig",
    "PipelineSpec",
    "PrepareConfig",
    "Resources",
    "Retry",
    "SamplingConfig",
    "ScalingConfig",
    "SearchDimension",
    "Spec",
    "Step",
    "TokenizerConfig",
    "TrainConfig",
    "TuneConfig",
    "Work",
    "load",
    "read",
    "script_of",
    "validate",
]
