"""Engines on CPUs that leave cores to others, as vLLM itself sees their config."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import tiny_model

ASK = """
from vllm.engine.arg_utils import EngineArgs
from vllm.distributed.device_communicators import shm_broadcast
config = EngineArgs(model={model!r}, max_model_len=256, distributed_executor_backend="mp",
                    enforce_eager=True).create_engine_config()
print("SAYS", config.parallel_config.distributed_executor_backend,
      shm_broadcast.sched_yield.__module__)
"""
ROUND_TRIP = """
import threading
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.distributed.device_communicators import shm_broadcast
queue = shm_broadcast.MessageQueue(1, 1)
reader = shm_broadcast.MessageQueue.create_from_handle(queue.export_handle(), 0)
threading.Thread(target=lambda: [queue.enqueue(i) for i in range(2000)], daemon=True).start()
assert [reader.dequeue(timeout=20) for _ in range(2000)] == list(range(2000))
print("SAYS whole", shm_broadcast.sched_yield.__module__)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_model.write(str(tmp_path_factory.mktemp("storage")), "tiny")


def says(code: str, **environment: str) -> list[str]:
    """What a process of its own prints after SAYS."""
    outer = {name: value for name, value in os.environ.items() if name != "MANTA_ENGINE_CORES"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=outer | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=180,
        cwd=Path(__file__).parent,
    )
    found = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("SAYS")]
    assert found, done.stdout + done.stderr
    return found[0]


def test_an_engine_of_one_thread_is_one_process(model: str) -> None:
    found = says(ASK.format(model=model), MANTA_ENGINE_CORES="few", VLLM_CPU_OMP_THREADS_BIND="0")
    assert found[0] == "uni"


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
def test_an_engine_of_two_threads_keeps_its_worker_and_waits_asleep(model: str) -> None:
    found = says(
        ASK.format(model=model), MANTA_ENGINE_CORES="few", VLLM_CPU_OMP_THREADS_BIND="0-1"
    )
    assert found == ["mp", "manta.serving.engine.engine_cores"]


def test_without_the_variable_vllm_is_as_it_was(model: str) -> None:
    found = says(ASK.format(model=model), VLLM_CPU_OMP_THREADS_BIND="0")
    assert found == ["mp", "vllm.distributed.utils"]


def test_messages_of_an_engine_that_waits_asleep_all_arrive() -> None:
    assert says(ROUND_TRIP, MANTA_ENGINE_CORES="few") == [
        "whole",
        "manta.serving.engine.engine_cores",
    ]
