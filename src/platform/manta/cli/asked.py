"""What a command line asks to be run: from words to a complete request."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from manta.cli import output
from manta.errors import InputError

if TYPE_CHECKING:
    from manta.jobs.model import JobRequest
    from manta.plan.jobs import JobPlan
    from manta.spec import JobSpec
    from manta.state import State


def folder(working_dir: str) -> Path:
    """The folder to ship. Raises InputError if there is none."""
    root = Path(working_dir).resolve()
    if not root.is_dir():
        raise InputError(f"--working-dir {working_dir} is not a folder")
    return root


def is_pipeline(job: tuple[str, ...]) -> bool:
    """Whether the words name a pipeline file: it has `steps`. Raises InvalidSpec or InputError."""
    from manta.spec import read

    if len(job) != 1 or not job[0].endswith((".yaml", ".yml")):
        return False
    value = read(job[0]).value
    return isinstance(value, dict) and "steps" in value


def spec_of(job: tuple[str, ...], root: Path) -> JobSpec:
    """The job that `JOB.yaml`, or a command, describes. Raises InvalidSpec or InputError."""
    from manta.check import work
    from manta.spec import JobSpec

    if len(job) == 1 and job[0].endswith((".yaml", ".yml")):
        return work.load_job(job[0], root)
    return JobSpec(name="job", entrypoint=shlex.join(job))


def request_of(
    state: State,
    plan: JobPlan,
    spec: JobSpec,
    root: Path,
    *,
    cluster: str,
    file: str,
    budget_said: bool = False,
) -> JobRequest:
    """The request, its code shipped to storage.

    Args:
        state: says which clusters there are.
        plan: what to run.
        spec: how it queues.
        root: folder to ship.
        cluster: where, unless the spec names clusters.
        file: first word of the job; a fault of its budget is told with the line if it is a file.
        budget_said: whether the budget is from the command line instead.
    """
    from manta.jobs import request

    spec = request.placed(spec, plan)
    cluster = spec.clusters[0] if spec.clusters else cluster
    is_file = file.endswith((".yaml", ".yml")) and not budget_said
    with _located(file if is_file else ""), output.progress(f"submitting {plan.submission_id}"):
        return request.prepare(
            plan,
            spec,
            cluster=cluster,
            storage_url=request.storage_of(state, cluster),
            working_dir=root,
        )


@contextmanager
def _located(file: str) -> Iterator[None]:
    """A budget below the price is a fault of the line that gives it, if a file does."""
    from manta.errors import Finding, InvalidSpec
    from manta.jobs.own_budget import OverBudget
    from manta.spec.loading import read

    try:
        yield
    except OverBudget as error:
        if not file:
            raise
        line = read(file).line(("budget_usd",))
        fault = Finding(file=file, line=line, what=error.what, fix=error.fix, rule="budget")
        raise InvalidSpec([fault]) from None
