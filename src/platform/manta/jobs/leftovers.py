"""Processes that a stopped job left behind on this machine.

Ray ends the driver, its workers and the children that they have at that moment. Who forked twice
and started a session of its own is nobody's child any more, but still has the environment that Ray
gave the driver or the worker.
"""

from __future__ import annotations

import contextlib
import json
import time

import psutil

from manta.cluster.processes import CLUSTER_ID_VARIABLE

JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Ray's: what it tells a driver about its job (job_supervisor.py)."""
RAY_JOB_VARIABLE = "RAY_JOB_ID"
"""Ray's: whose worker a process is (worker_pool.cc)."""
PATIENCE_S = 2.0


def end(cluster_id: str, submission_id: str, ray_job_id: str = "") -> int:
    """Kill what is left of a submission to a cluster on this machine; returns how many it was.

    Args:
        cluster_id: of the cluster.
        submission_id: whose driver and all that it started is ended.
        ray_job_id: whose workers and all that they started is ended too; empty: none.
    """
    ended: set[int] = set()
    deadline = time.monotonic() + PATIENCE_S
    while (
        left := _members(cluster_id, submission_id, ray_job_id)
    ) and time.monotonic() < deadline:
        for process in left:  # again: one may have forked meanwhile
            ended.add(process.pid)
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        time.sleep(0.02)
    return len(ended)


def _members(cluster_id: str, submission_id: str, ray_job_id: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            environment = process.environ()
            if environment.get(CLUSTER_ID_VARIABLE) != cluster_id:
                continue
            config = environment.get(JOB_VARIABLE, "{}")
            told = json.loads(config).get("metadata", {}).get("job_submission_id")
            worker = bool(ray_job_id) and environment.get(RAY_JOB_VARIABLE) == ray_job_id
            if (worker or told == submission_id) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, ValueError):
            continue  # ended meanwhile, or of another user and so not ours
    return found
