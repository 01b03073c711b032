"""Complete a file of prompts with a model, as batch inference; resumable.

ray job submit --working-dir . -- python jobs/generate.py --config configs/generate.yaml
"""

from manta.spec import GenerateConfig
from manta.workloads import entry
from manta.workloads.generate import generate

if __name__ == "__main__":
    entry.run(GenerateConfig, generate, __doc__)
