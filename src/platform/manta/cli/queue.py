"""`manta queue`: the controller, which starts jobs in their order and keeps their history."""

from __future__ import annotations

import logging
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from manta.cli import output
from manta.errors import InputError

DEPLOY_PATIENCE_S = 1800.0
"""How long a step of a pipeline waits for another deploy to end."""

if TYPE_CHECKING:
    from collections.abc import Callable

    from manta.state import State


@click.command(epilog=output.example("manta queue", "manta queue --status --json"))
@click.option("--status", is_flag=True, help="Say who is at work, and how many jobs wait and run.")
@click.option("--stop-when-idle", type=click.FloatRange(0), metavar="MINUTES", help="[never]")
@click.option(
    "--max-running", type=click.IntRange(1), default=16, show_default=True, help="Jobs a cluster."
)
@click.option(
    "--preempt", is_flag=True, help="Stop and requeue jobs for others of a higher priority."
)
@click.option(
    "--http",
    metavar="[HOST:]PORT",
    help="Serve the web page and the HTTP API too; see `manta access`.",
)
@output.json_option
def command(
    status: bool,
    stop_when_idle: float | None,
    max_running: int,
    preempt: bool,
    http: str | None,
    as_json: bool,
) -> int:
    """Be the controller: start queued jobs, retry, ship logs; until Ctrl-C.

    For use on one machine it is started by itself when a command needs it. For a team, run it as
    a service with $MANTA_STATE set to a database; a second one waits until the first is gone.
    Stopping it stops no job.
    """
    from manta import state as states
    from manta.jobs import daemon
    from manta.jobs.controller import Options

    url = states.url()
    state = states.open_state(url)
    if status:
        return _print_status(state, as_json)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    if http:
        _serve(state, http)
    idle_stop_s = None if stop_when_idle is None else stop_when_idle * 60
    options = Options(
        idle_stop_s=idle_stop_s, max_running=max_running, preempt=preempt, deploy=_deploy
    )
    daemon.run(state, url, options, output.say)
    return 0


def _deploy(cluster: str, name: str, text: str, say: Callable[[str], None]) -> str:
    """Apply a Serve config that a step of a pipeline holds; its URL when it is healthy.

    One deploy changes a cluster at a time: others of the run, or of people, are waited for.
    """
    from manta.cluster import record
    from manta.serving import rollout
    from manta.serving.apps.lock import Taken

    deadline = time.monotonic() + DEPLOY_PATIENCE_S
    with tempfile.TemporaryDirectory(prefix="manta-") as folder:
        file = Path(folder, Path(name).name)
        file.write_text(text)
        while True:
            try:
                return rollout.deploy_file(record.find(cluster), str(file), say).url
            except Taken as error:
                if time.monotonic() > deadline:
                    raise
                say(f"waits: {error.what}")
                time.sleep(2.0)


def _serve(state: State, address: str) -> None:
    from manta.jobs import http_api

    host, _, port = address.rpartition(":")
    if not port.isdigit() or not 0 < int(port) < 65536:
        raise InputError(f"--http {address}: not [HOST:]PORT", "e.g. 8400 or 127.0.0.1:8400")
    host = host or "127.0.0.1"
    http_api.serve(state, host, int(port))
    output.say(f"web page on http://{host}:{port}, API under /api/v1, document at /openapi.json")
    if host not in ("127.0.0.1", "localhost", "::1"):
        output.say("keys go over it in clear: put TLS in front")


def _print_status(state: State, as_json: bool) -> int:
    from manta.jobs import lease, queries

    holder = lease.holder(state)
    counts = queries.counts(state)
    if as_json:
        output.print_json({"controller": holder, "jobs": counts})
    else:
        click.echo(f"controller  {holder or 'none; the next command starts one'}")
        for name, count in counts.items():
            click.echo(f"{name.lower():<11} {count}")
    return 0 if holder else 1
