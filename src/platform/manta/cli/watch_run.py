"""Following a run on the terminal: each step's start, log and end; Ctrl-C that harms nothing."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from manta.cli import output, watch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from manta.jobs.runs import Run, RunStep
    from manta.state import State


def attempts(state: State, run_id: str) -> dict[str, int]:
    """Job id → its newest attempt, of a run. Raises InputError if there is no such run."""
    from manta.jobs import queries, runs

    ids = [step.job_id for step in runs.get(state, run_id).steps if step.job_id]
    found = (queries.find(state, job_id) for job_id in ids)
    return {job.id: job.attempt for job in found if job is not None}


def until_done(
    state: State,
    run_id: str,
    *,
    as_json: bool,
    after_attempts: Mapping[str, int] | None = None,
) -> int:
    """Show the run until it ends; returns the exit code: 0 if it succeeded, else 1.

    Logs go to stderr, so that stdout holds the summary, or one document with `as_json`.
    """
    from manta.jobs import runs
    from manta.jobs.follow import follow_run

    begun = time.monotonic()
    earlier = {step.name for step in runs.get(state, run_id).steps if step.settled}
    try:
        run = follow_run(
            state,
            run_id,
            _Terminal(state, run_id, earlier),
            lambda: watch.keep(state),
            after_attempts=after_attempts,
        )
    except KeyboardInterrupt:
        output.say(
            f"\n{run_id} goes on. Watch it: manta logs -f {run_id}  Stop it: manta stop {run_id}"
        )
        raise
    if as_json:
        print_json(run, total_s=time.monotonic() - begun)
    else:
        print_summary(run)
    if run.state != "SUCCEEDED":
        output.say(f"Try the rest again: manta retry {run_id}")
    return 0 if run.state == "SUCCEEDED" else 1


def print_json(run: Run, **more: Any) -> None:
    """A run for programs; a step's `submission_id` and `status` are called as Ray calls them."""
    steps = [
        {"status": step.state, "submission_id": step.job_id, "duration_s": duration_s(step)}
        | asdict(step)
        for step in run.steps
    ]
    output.print_json(
        {"run_id": run.id, "status": run.state, **more, **asdict(run), "steps": steps}
    )


def print_summary(run: Run) -> None:
    """How each step ended, what was made, and where to look."""
    from manta.cluster import record
    from manta.errors import MantaError

    click.echo()
    print_steps(run)
    made = [(s.name, name, url) for s in run.steps for name, url in s.artifacts.items()]
    if made:
        click.echo()
        output.print_table(["STEP", "MADE", "WHERE"], made)
    total_s = (run.ended_at or time.time()) - run.started_at
    click.echo(f"\nrun        {run.id}, {watch.seconds(total_s)} in all")
    try:
        target = record.find(run.cluster)
    except MantaError:
        return
    click.echo(f"dashboard  {target.dashboard_url}")
    click.echo(f"endpoint   {target.serve_url}")
    click.echo(f"storage    {target.storage_url}")


def print_steps(run: Run) -> None:
    """A table of the run's steps."""
    output.print_table(
        ["STEP", "STATUS", "TIME", "JOB"],
        [
            (step.name, _status(step), watch.seconds(duration_s(step)), step.job_id or "-")
            for step in run.steps
        ],
    )


def duration_s(step: RunStep) -> float | None:
    """Seconds that a step took or has taken yet; None if it has not begun, or need not."""
    if step.started_at is None or _is_unchanged(step):
        return None
    return max(0.0, (step.ended_at or time.time()) - step.started_at)


def _status(step: RunStep) -> str:
    return f"{step.state} (unchanged)" if _is_unchanged(step) else step.state or "NOT BEGUN"


def _is_unchanged(step: RunStep) -> bool:
    from manta.jobs import unchanged

    return step.message == unchanged.MESSAGE


class _Terminal:
    """A line when a step starts and ends, its log indented between.

    When several run at once each line begins with its step's name.
    """

    def __init__(self, state: State, run_id: str, earlier: set[str]) -> None:
        self._state, self._run_id, self._earlier = state, run_id, earlier
        self._open: dict[str, str] = {}
        self._num_steps = 0

    def started(self, step: RunStep, number: int) -> None:
        if step.name in self._earlier or _is_unchanged(step):
            return
        self._open[step.name] = ""
        if not self._num_steps:
            from manta.jobs import runs

            self._num_steps = len(runs.get(self._state, self._run_id).steps)
        output.say(click.style(f"[{number}/{self._num_steps}] {step.name}", bold=True))

    def log(self, step: RunStep, text: str) -> None:
        if step.name not in self._open:
            return
        prefix = f"    {step.name} | " if len(self._open) > 1 else "    "
        *lines, rest = (self._open[step.name] + text).split("\n")
        for line in lines:
            click.echo(f"{prefix}{line}", err=True)
        self._open[step.name] = rest

    def ended(self, step: RunStep) -> None:
        if rest := self._open.pop(step.name, ""):
            click.echo(f"    {rest}", err=True)
        if _is_unchanged(step):
            output.say(f"{step.name}: unchanged, taken from {step.job_id}")
            return
        when = " earlier" if step.name in self._earlier else ""
        end = f"{step.name}: {step.state.lower()}{when} in {watch.seconds(duration_s(step))}"
        failed = step.state not in ("SUCCEEDED", "")
        output.say(f"{end}. {step.message.strip()}" if failed else end)
