"""What was done beside jobs, noted in the same order: to clusters, applications and keys."""

from __future__ import annotations

from manta import state as states
from manta.jobs import request
from manta.state import State, events, now


def note(state: State, kind: str, text: str, *, cluster: str = "") -> None:
    """Write an event of this user on this machine. Raises MantaError if the state is away."""
    row = {"at": now(), "actor": request.actor(), "kind": kind, "text": text}
    with state.write() as connection:
        connection.execute(events.insert().values(**row, job_id="", cluster=cluster))


def note_here(kind: str, text: str, *, cluster: str = "") -> None:
    """The same in the state that `$MANTA_STATE` names."""
    state = states.open_state()
    try:
        note(state, kind, text, cluster=cluster)
    finally:
        state.close()
