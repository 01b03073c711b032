"""A job's connection to Ray: quiet, and failing in one line."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Iterator
from typing import Any

import ray
import ray.data
from ray.exceptions import RayError, RayTaskError

from manta.errors import InputError, MantaError
from manta.workloads import entry

CONNECT_TIMEOUT_S = 10.0
PROGRESS_INTERVAL_S = 10.0


def connect() -> None:
    """Attach to the cluster that the environment names, or start one on this machine.

    Raises MantaError if the named cluster does not answer.
    """
    _check_address(os.environ.get("RAY_ADDRESS", ""))
    try:
        if not ray.is_initialized():
            ray.init(logging_level=logging.WARNING)
    except (ConnectionError, RayError) as error:
        raise _no_cluster(str(error).strip().splitlines()[0]) from None
    _quiet_data()


def _check_address(address: str) -> None:
    """Ray itself tries for minutes to reach an address where nothing listens."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in host:  # `auto`, `local`, `ray://…`, or none
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise _no_cluster(f"{address}: {error.strerror or error}") from None


def _no_cluster(reason: str) -> MantaError:
    return MantaError(
        f"no Ray cluster answers ({reason})", "start one with `manta up`, or unset RAY_ADDRESS"
    )


def _quiet_data() -> None:
    """Let Ray Data's warnings through; what it logs of a failed task, the error says."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.raise_original_map_exception = True
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    for chatty in ("exceptions", "_internal.execution.streaming_executor_state"):
        logging.getLogger(f"ray.data.{chatty}").setLevel(logging.CRITICAL)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Raise the MantaError that a task raised as it was, without the traceback around it."""
    try:
        yield
    except RayTaskError as error:
        cause = error.cause
        if not isinstance(cause, MantaError):
            raise
        kind = InputError if isinstance(cause, InputError) else MantaError
        raise kind(cause.what, cause.fix) from None  # anew: Ray adds lines to the message
    except RayError as error:
        raise MantaError(f"Ray: {str(error).strip().splitlines()[0]}") from error


def rows(dataset: ray.data.Dataset, what: str, total: int) -> Iterator[dict[str, Any]]:
    """The rows as they come, with a line of progress every PROGRESS_INTERVAL_S."""
    said = time.monotonic()
    with plain_errors():
        for done, row in enumerate(dataset.iter_rows(), start=1):
            yield row
            if time.monotonic() - said > PROGRESS_INTERVAL_S:
                said = time.monotonic()
                entry.progress(f"  {what}: {done:,} of {total:,}")
