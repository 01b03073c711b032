"""Ask a running OpenAI-compatible endpoint, streaming.

ray job submit --working-dir . -- python jobs/ask.py --config configs/ask.yaml
"""

from manta.spec import AskConfig
from manta.workloads import entry
from manta.workloads.ask import ask_all

if __name__ == "__main__":
    entry.run(AskConfig, ask_all, __doc__)
