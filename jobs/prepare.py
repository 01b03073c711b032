"""Read text, clean it, and pack it into a versioned dataset of token blocks.

ray job submit --working-dir . -- python jobs/prepare.py --config configs/prepare.yaml
"""

from manta.spec import PrepareConfig
from manta.workloads import entry
from manta.workloads.prepare import prepare

if __name__ == "__main__":
    entry.run(PrepareConfig, prepare, __doc__)
