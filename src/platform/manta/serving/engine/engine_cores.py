"""A vLLM engine on a CPU that leaves cores to others: fewer processes, and none that spins.

On a CPU vLLM runs an engine as two processes, the core and a worker. They pass steps through
shared memory, where whoever waits calls `sched_yield` in a loop until a second after the last
message: under load both are always busy. On two cores HTTP server, proxy and client then wait
for milliseconds at each token. With `MANTA_ENGINE_CORES=few` in its environment an engine

- whose worker would have one thread (machines of two cores) does its work in the core's own
  process: there is nobody to wait for, and one process less to start;
- with more threads, which vLLM binds to cores by starting a process for them, has that process,
  and who waits sleeps between two looks.

vLLM loads this in each of its processes, as a plugin of its group `vllm.general_plugins`. Nothing
happens where the variable is not set. What it gains is in docs/measurements.md.
"""

from __future__ import annotations

import os
import time
from typing import Any

VARIABLE, FEW = "MANTA_ENGINE_CORES", "few"
WAIT_S = 50e-6
"""Between two looks; the kernel adds some 50 µs (prctl(2), PR_SET_TIMERSLACK)."""


def register() -> None:
    """What vLLM calls in each process, once."""
    if os.environ.get(VARIABLE) != FEW:
        return
    from vllm.distributed.device_communicators import shm_broadcast
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    shm_broadcast.sched_yield = lambda: time.sleep(WAIT_S)
    platform = type(current_platform)
    check_theirs = platform.check_and_update_config

    def check_and_update_config(vllm_config: Any) -> None:
        check_theirs(vllm_config)
        if _has_one_thread(vllm_config):
            vllm_config.parallel_config.distributed_executor_backend = "uni"
            os.environ["OMP_NUM_THREADS"] = "1"  # of the core's process, which starts after this

    platform.check_and_update_config = staticmethod(check_and_update_config)


def _has_one_thread(vllm_config: Any) -> bool:
    """Whether vLLM would start one worker, and bind it to one core."""
    from vllm.utils.ompmultiprocessing import OMPProcessManager

    parallel = vllm_config.parallel_config
    if parallel.world_size != 1 or parallel.distributed_executor_backend != "mp":
        return False
    return [len(cores) for cores in OMPProcessManager(vllm_config).cpu_lists] == [1]
