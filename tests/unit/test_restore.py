"""Which version of an application was in force when its cluster died."""

from __future__ import annotations

from manta.serving.apps.history import Action, Outcome, State, Version
from manta.serving.restore import in_force


def version(
    number: int, state: State | None, action: Action = "deploy", replaced: int | None = None
) -> Version:
    return Version(
        app="a",
        number=number,
        action=action,
        at=float(number),
        by="me",
        cluster_id="c",
        config_passthrough=None if action == "undeploy" else {"name": "a", "number": number},
        replaced=replaced,
        outcome=Outcome(state=state, after_s=1) if state else None,
    )


def number_of(*versions: Version) -> int | None:
    found = in_force(versions)
    return found and found.number


def test_the_last_healthy_version_is_in_force() -> None:
    assert number_of() is None
    assert number_of(version(1, "healthy")) == 1
    assert number_of(version(1, "healthy"), version(2, "healthy", "rollback", 1)) == 2


def test_a_version_that_failed_or_whose_end_nobody_saw_leaves_what_it_replaced() -> None:
    first = version(1, "healthy")
    assert number_of(first, version(2, "failed", replaced=1)) == 1
    assert number_of(first, version(2, None, replaced=1)) == 1
    assert number_of(first, version(2, "failed", replaced=1), version(3, None, replaced=1)) == 1
    assert number_of(version(1, "failed")) is None


def test_what_was_removed_is_not_in_force() -> None:
    first, gone = version(1, "healthy"), version(2, "removed", "undeploy", 1)
    assert number_of(first, gone) is None
    assert number_of(first, gone, version(3, "failed")) is None
