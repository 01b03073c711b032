"""Which queued jobs go to another of their clusters. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from manta.jobs.books import Books, Needs, Room, Running, Shares, Waiting


def moves(
    now: float,
    jobs: Iterable[Waiting],
    running: Sequence[Running],
    rooms: Mapping[str, Room],
    needs_of: Mapping[str, Needs],
) -> list[tuple[str, str, str]]:
    """(id, cluster, reason) of each job that should wait elsewhere, oldest first.

    A job leaves a cluster that does not answer for the next that does and could hold it; one that
    has waited its `spill_after_s` where there is no place, for one that has place now. What goes
    there in this pass is counted.
    """
    books = Books(rooms, running, Shares())
    found = []
    for job in sorted(jobs, key=lambda job: (-job.priority, job.seq)):
        needs = needs_of[job.shape]
        room = rooms.get(job.cluster)
        if room is None:
            continue  # nobody has looked at it yet
        if not room.answers:
            target = _first(job, books, needs, free=False)
            reason = "it does not answer"
        elif now >= job.queued_at + job.spill_after_s and books.lacking(job.cluster, needs):
            target = _first(job, books, needs, free=True)
            reason = f"no place for {job.spill_after_s:g} s"
        else:
            continue
        if target:
            books.start(job._replace(cluster=target), needs)
            found.append((job.id, target, reason))
    return found


def _first(job: Waiting, books: Books, needs: Needs, *, free: bool) -> str:
    """The best other cluster that answers and could hold the job; now, if `free`."""
    for name in job.clusters.split():
        room = books.rooms.get(name)
        if name == job.cluster or room is None or not room.answers:
            continue
        if books.impossible(name, needs) or (free and books.lacking(name, needs)):
            continue
        return name
    return ""
