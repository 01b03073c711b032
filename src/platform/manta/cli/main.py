"""`manta`: a table of commands, each loaded from its own file when it is asked for."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

import click

import manta
from manta.errors import InputError, InvalidSpec, MantaError

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it: 128 + SIGINT."""

# Each name is a module beside this one that defines `command`. The line is repeated here so that
# `manta --help` need not import them.
COMMANDS = {
    "up": "Start a Ray cluster: on this machine, or the one of a cluster YAML.",
    "down": "Stop a cluster and everything that it started.",
    "attach": "Make a Ray cluster known that others started: KubeRay, `ray up`.",
    "detach": "Forget such a cluster; it goes on.",
    "status": "Show a cluster: nodes, resources, jobs, applications.",
    "drain": "Empty a worker and let it go; no request is lost.",
    "env": "Print the variables under which plain ray and serve commands reach a cluster.",
    "check": "Check cluster, Serve, job and pipeline files; nothing is started.",
    "doctor": "Check this machine: versions, ports, credentials, disk; say what to do.",
    "plan": "Show which nodes Ray would launch for some work, and what they cost.",
    "prices": "Fetch today's list prices.",
    "render": "Write Kubernetes manifests for KubeRay from a cluster YAML.",
    "submit": "Submit one job: a spec, or a command.",
    "run": "Run a pipeline: jobs in the order of their needs.",
    "runs": "List pipeline runs, and how far they are.",
    "jobs": "List jobs; `jobs show` tells one's story.",
    "logs": "Print or follow the log of a job or a run.",
    "stop": "Stop a job, or a run.",
    "retry": "Put a job, or the steps of a run, that failed back into the queue.",
    "events": "Print what happened, in order.",
    "access": "Make and withdraw keys of the queue's HTTP API.",
    "cron": "Show and set jobs and pipelines that come again.",
    "quota": "Show and set what teams and users are due, and may hold at most.",
    "budget": "Show and set what teams may spend.",
    "usage": "Show what teams, users and jobs have held, and what it cost.",
    "queue": "Run the controller that starts queued jobs.",
    "deploy": "Deploy the applications of a Serve config; go back if they fail.",
    "apps": "List deployed applications; `apps history`: what they were; `apps restore`.",
    "rollback": "Go back to an earlier version of an application.",
    "undeploy": "Remove an application.",
    "models": "Keep numbered versions of models, and say which is which.",
    "keys": "Make, list and revoke API keys; show what they used.",
}


class LazyGroup(click.Group):
    """A group that imports a command's module only to run it or to show its help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, imported now; None if there is none of this name."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f"manta.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the table of commands from their one-line descriptions."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(manta.__version__, prog_name="manta")
def cli() -> None:
    """Check, plan, submit, scale and remember work on one Ray cluster."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command; exit 0 done, 1 the work failed, 2 bad usage or input, 130 Ctrl-C.

    Any other exception is a bug of ours and keeps its traceback.
    """
    raise SystemExit(_exit_code(arguments))


def _exit_code(arguments: Sequence[str] | None) -> int:
    try:
        _require_text(sys.argv[1:] if arguments is None else arguments)
        result: Any = cli.main(arguments, prog_name="manta", standalone_mode=False)
    except MantaError as error:
        prefix = "" if isinstance(error, InvalidSpec) else "Error: "  # findings begin file:line
        click.echo(f"{prefix}{error}", err=True)
        return error.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("Interrupted.", err=True)
        return INTERRUPTED
    return result if isinstance(result, int) else 0


def _require_text(arguments: Sequence[str]) -> None:
    """Raise InputError for bytes that are no text: nothing that is kept could hold them."""
    for argument in arguments:
        shown = argument.encode("utf-8", "replace").decode()
        if shown != argument:
            raise InputError(f"`{shown[:100]}` is not UTF-8", "put odd bytes into a file")


if __name__ == "__main__":
    main(sys.argv[1:])
