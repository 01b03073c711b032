"""`manta logs`: what a job has written."""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING

import click

from manta.cli import output, watch, watch_run
from manta.errors import InputError, MantaError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from manta.jobs.model import Attempt, Job

LARGE_BYTES = 8 * 2**20
"""The cluster gives a log in one piece: of a longer one what is shipped so far is shown."""


@click.command(epilog=output.example("manta logs train-1a2b3c4d", "manta logs -f train-1a2b3c4d"))
@click.argument("job")
@click.option("-f", "--follow", is_flag=True, help="Go on until the job ends; exit 1 if it fails.")
@click.option("--attempt", type=click.IntRange(1), help="Of this attempt. [the newest]")
@output.json_option
def command(job: str, follow: bool, attempt: int | None, as_json: bool) -> int:
    """Print the log of JOB; with -f, follow it or a run. Ctrl-C stops the following, not the job.

    It comes from storage, so it is there when the cluster is not.
    """
    from manta.jobs import queries, runs

    state = watch.open_state()
    if (run := runs.find(state, job)) is not None:
        if follow:
            return watch_run.until_done(state, job, as_json=as_json)
        ids = ", ".join(step.job_id for step in run.steps if step.job_id and step.state)
        raise InputError(
            f"{job} is a run", f"follow it with -f, or name a job of it: {ids or '-'}"
        )
    found = watch.find(state, job)
    if follow:
        return watch.until_done(state, job, as_json=as_json)
    tries = queries.attempts_of(state, job)
    if attempt is not None and attempt > len(tries):
        raise InputError(f"job {job} has {len(tries)} attempts", f"there is no {attempt}")
    pieces = _pieces(found, tries[(attempt or 0) - 1]) if tries else iter(())
    if as_json:
        output.print_json({"submission_id": job, "log": "".join(pieces)})
    else:
        for text in pieces:
            click.echo(text, nl=False)
    return 0


def _pieces(job: Job, attempt: Attempt) -> Iterator[str]:
    """The log: from the cluster while it grows, if that answers, else from storage."""
    from manta.cluster import record
    from manta.jobs import logs, ray_api

    url = logs.folder(job.storage_url, job.id, attempt.number)
    if attempt.log_state == "growing" and not _is_large(url):
        try:
            place = record.find(attempt.cluster)
            if place.cluster_id == attempt.cluster_id:
                yield ray_api.log_text(place, attempt.submission_id)
                return
        except MantaError:
            pass  # what has been shipped is there all the same
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    yield from map(decoder.decode, logs.read(url))
    yield decoder.decode(b"", final=True)


def _is_large(url: str) -> bool:
    from manta.jobs import logs

    try:
        return logs.size(url) > LARGE_BYTES
    except InputError:  # no storage just now: the cluster may have it
        return False
