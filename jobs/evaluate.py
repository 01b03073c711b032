"""Score an exported model on held-out text, beside a unigram model and xz.

ray job submit --working-dir . -- python jobs/evaluate.py --config configs/evaluate.yaml
"""

from manta.spec import EvaluateConfig
from manta.workloads import entry
from manta.workloads.evaluate import evaluate

if __name__ == "__main__":
    entry.run(EvaluateConfig, evaluate, __doc__)
