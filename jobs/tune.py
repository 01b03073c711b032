"""Search training parameters with Optuna and ASHA, on short runs of the training code."""

from manta.spec import TuneConfig
from manta.workloads import entry, tune

if __name__ == "__main__":
    entry.run(TuneConfig, tune.tune, __doc__)
