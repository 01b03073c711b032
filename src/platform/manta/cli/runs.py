"""`manta runs`: pipeline runs, and how far each is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from manta.cli import output, watch, watch_run
from manta.cli.jobs import when

if TYPE_CHECKING:
    from manta.jobs.runs import Run


@click.command(epilog=output.example("manta runs", "manta runs quickstart-20260102-030405-ab12"))
@click.argument("run", required=False)
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True, help="Newest N.")
@output.json_option
def command(run: str | None, limit: int, as_json: bool) -> None:
    """List pipeline runs, oldest first; or show the steps of RUN and what each made."""
    from manta.jobs import runs

    state = watch.open_state()
    if run is not None:
        found = runs.get(state, run)
        watch_run.print_json(found) if as_json else _show(found)
        return
    known = runs.listed(state, limit)[::-1]
    if as_json:
        output.print_json([_told(one) for one in known])
    elif known:
        output.print_table(
            ["RUN", "STATUS", "STEPS", "BEGAN (UTC)", "WHO", "CLUSTER"],
            [(o.id, o.state, _done(o), when(o.started_at), o.actor, o.cluster) for o in known],
        )
    else:
        output.say("no runs yet; begin one with `manta run`")


def _show(run: Run) -> None:
    click.echo(f"{run.id} {run.state}, {_done(run)} steps, by {run.actor}\n")
    watch_run.print_steps(run)
    for step in run.steps:
        if step.message and step.state in ("FAILED", "STOPPED"):
            click.echo(f"\n{step.name}: {step.message.strip()}")


def _done(run: Run) -> str:
    return f"{sum(step.succeeded for step in run.steps)} of {len(run.steps)}"


def _told(run: Run) -> dict[str, object]:
    steps = {step.name: step.state for step in run.steps}
    facts = ("pipeline", "actor", "cluster", "started_at", "ended_at")
    return {"run_id": run.id, "status": run.state, "steps": steps} | {
        name: getattr(run, name) for name in facts
    }
