"""Which node `manta drain` takes, and the plain command that it stands for."""

from __future__ import annotations

from typing import Any

import pytest

from manta.cluster import drain
from manta.cluster.dashboard import Node
from manta.errors import InputError


def node(name: str, address: str, **changes: Any) -> Node:
    values = {"state": "ALIVE", "is_head": False, "total": {}} | changes
    return Node(id=name, address=address, **values)


NODES = [
    node("aa00", "10.0.0.1", is_head=True),
    node("ab11", "10.0.0.2"),
    node("ac22", "10.0.0.3"),
    node("ad33", "10.0.0.4", state="DEAD"),
]


@pytest.mark.parametrize("wanted", ["10.0.0.2", "ab", "ab11"])
def test_a_worker_is_found_by_its_address_or_the_beginning_of_its_id(wanted: str) -> None:
    assert drain.choose(NODES, wanted).id == "ab11"


@pytest.mark.parametrize(
    ("wanted", "why"),
    [
        ("10.0.0.1", "the head cannot be drained"),
        ("10.0.0.4", "no nodes are `10.0.0.4`; name one of: 10.0.0.2 .ab11., 10.0.0.3"),
        ("a", "3 nodes are `a`"),
        ("", "no nodes"),
    ],
)
def test_what_cannot_be_drained_is_refused_with_what_can(wanted: str, why: str) -> None:
    with pytest.raises(InputError, match=why):
        drain.choose(NODES, wanted)


def test_it_is_a_plain_ray_command() -> None:
    words = drain.command(NODES[1], 60)
    assert words[:4] == ("ray", "drain-node", "--node-id", "ab11")
    assert words[-2:] == ("--deadline-remaining-seconds", "60")
    assert "--deadline-remaining-seconds" not in drain.command(NODES[1], None)
