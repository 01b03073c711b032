"""What serving is made of is killed every five seconds under constant load."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from load import Load
from serving_arena import ServingArena, kill_every, streamed, whole
from terminal import MANTA, Terminal, until

pytestmark = pytest.mark.timeout(600)

EACH_S, TIMES = 5.0, 5
BACK_OFF_S = 0.5
"""Before a request is sent again, once: the official OpenAI client's."""
LEAST_GOOD = 0.999


@pytest.fixture(scope="module")
def serving(cluster: Terminal) -> ServingArena:
    """A guarded application of two replicas; the cluster is started if a test has killed it."""
    if cluster(MANTA, "status", ok=None).returncode:
        until(lambda: cluster(MANTA, "up", "--ports", "auto", ok=None).returncode == 0, "up again")
    arena = ServingArena(cluster)
    arena.deploy_echo()
    return arena


def load_on(arena: ServingArena) -> Load:
    asks = [whole(arena.url)] * 4 + [streamed(arena.url)] * 4
    return Load(
        asks, retries=1, back_off_s=BACK_OFF_S, headers=arena.headers, deadline_s=30, pause_s=0.03
    )


KILLS: dict[str, Callable[[ServingArena], int]] = {
    "replica": lambda arena: kill_every(EACH_S, TIMES, arena.replicas, least=2),
    "haproxy": lambda arena: kill_every(EACH_S, TIMES, lambda: arena.named("bin/haproxy")),
    "proxy": lambda arena: kill_every(
        EACH_S, TIMES, lambda: arena.named("ray::HAProxyManager", "ray::ProxyActor")
    ),
    "controller": lambda arena: kill_every(
        EACH_S, TIMES, lambda: arena.named("ray::ServeController")
    ),
}


@pytest.mark.parametrize("what", KILLS)
def test_what_is_killed_loses_no_request_that_is_sent_again_once(
    serving: ServingArena, what: str
) -> None:
    until(lambda: len(serving.replicas()) == 2, "two replicas")
    with load_on(serving) as load:
        num_kills = KILLS[what](serving)
    print(f"\n{what} killed {num_kills} times: {load}")
    assert load.share_good >= LEAST_GOOD
    assert load.wrong == []
    assert load.num_hung == 0
    assert set(load.answers) == {"whole", "streamed"}
