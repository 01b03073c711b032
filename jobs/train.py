"""Train a causal language model on a prepared dataset, and export it for transformers and vLLM."""

from manta.spec import TrainConfig
from manta.workloads import entry, train

if __name__ == "__main__":
    entry.run(TrainConfig, train.train, __doc__)
