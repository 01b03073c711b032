"""What serving is made of is killed every five seconds under constant load."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import tiny_model
from echo_app import answer_to
from load import Load
from serving_arena import NAME, ServingArena, generated, kill_every, streamed, whole
from terminal import MANTA, Terminal, until
from test_chaos_head import kill_all_of_the_head

from manta.workloads import layout

pytestmark = pytest.mark.timeout(600)

EACH_S, TIMES = 5.0, int(os.environ.get("MANTA_CHAOS_SERVING_KILLS", "3"))
BACK_OFF_S = 0.5
"""Before a request is sent again, once: the official OpenAI client's."""
LEAST_GOOD = 0.999
LLM, SERVER = "tiny", "LLMServer"


@pytest.fixture(scope="module")
def serving(cluster: Terminal) -> Iterator[ServingArena]:
    """A guarded application of two replicas; the cluster is started if a test has killed it."""
    if cluster(MANTA, "status", ok=None).returncode:
        until(lambda: cluster(MANTA, "up", "--ports", "auto", ok=None).returncode == 0, "up again")
    arena = ServingArena(cluster)
    arena.deploy_echo()
    yield arena
    cluster(MANTA, "undeploy", NAME)


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


def test_a_replica_that_is_wrongly_slow_is_replaced_and_the_other_is_not(
    serving: ServingArena,
) -> None:
    before = set(until(lambda: len(two := serving.replicas()) == 2 and two, "two replicas"))
    with load_on(serving) as load:
        told = httpx.post(f"{serving.url}/slow", json={"wait_s": 2}, headers=serving.headers)
        slow = told.json()["pid"]
        assert slow in before
        until(lambda: slow not in (now := serving.replicas()) and len(now) == 2, "replaced")
    print(f"\none replica made slow: {load}")
    assert before - set(serving.replicas()) == {slow}
    assert load.share_good >= LEAST_GOOD
    assert load.wrong == []


@pytest.mark.skipif(
    "MANTA_CHAOS_ENGINE" not in os.environ,
    reason="two engines start for minutes: MANTA_CHAOS_ENGINE=1; test_inference.py kills one",
)
def test_an_engine_that_is_killed_takes_its_replica_along_and_the_other_goes_on(
    serving: ServingArena,
) -> None:
    tiny_model.write(serving.terminal.environment["MANTA_STORAGE"], LLM)
    serving.terminal(MANTA, "deploy", serving.llm_file(LLM))
    url = f"{serving.record.serve_url}/{LLM}"
    asks = [generated(url, LLM, stream=stream) for stream in (True, True, False, False)]
    before = set(serving.replicas(LLM, SERVER))
    assert len(before) == 2
    with Load(asks, retries=1, back_off_s=BACK_OFF_S, headers=serving.headers) as load:
        until(lambda: sum(load.answers.values()) > 20, "answers")
        kill_every(0, 1, lambda: serving.named("VLLM::EngineCore"))
        began = time.monotonic()
        until(
            lambda: len(before & set(serving.replicas(LLM, SERVER))) == 1, "its replica has ended"
        )
        seen_s = time.monotonic() - began
        until(lambda: len(serving.replicas(LLM, SERVER)) == 2, "replaced")
        replaced_s = time.monotonic() - began
        num = sum(load.answers.values())
        until(lambda: sum(load.answers.values()) > num + 20, "answers")
    print(f"\nan engine killed: {load}; seen after {seen_s:.1f} s, replaced {replaced_s:.1f} s")
    a_damaged_model_is_refused_before_traffic_moves(serving)
    serving.terminal(MANTA, "undeploy", LLM)
    assert load.share_good >= LEAST_GOOD
    assert load.wrong == []
    assert load.num_hung == 0


def a_damaged_model_is_refused_before_traffic_moves(serving: ServingArena) -> None:
    weights = Path(layout.model(LLM, serving.terminal.environment["MANTA_STORAGE"]))
    (file,) = weights.glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    before = set(serving.replicas(LLM, SERVER))
    path = serving.llm_file(LLM, max_requests_in_flight=7)
    refused = serving.terminal(MANTA, "deploy", path, ok=2)
    assert "is damaged" in refused.stderr
    assert set(serving.replicas(LLM, SERVER)) == before


def test_what_ran_when_the_head_died_runs_again_after_manta_up(serving: ServingArena) -> None:
    kill_all_of_the_head(serving.record.cluster_id, serving.record.pid)
    began = time.monotonic()
    up = serving.terminal(MANTA, "up", "--ports", "auto")
    with httpx.Client(headers=serving.headers, timeout=30) as client:
        body = {"model": NAME, "prompt": "again"}
        answer = client.post(f"{serving.url}/v1/completions", json=body)
    print(f"\nthe head killed: answers again {time.monotonic() - began:.1f} s after `manta up`")
    assert answer.json()["choices"][0]["text"] == answer_to("again")
    assert f"`{NAME}` ran here: deploying version" in up.stderr
    rows = json.loads(serving.terminal(MANTA, "apps", "history", NAME, "--json").stdout)
    assert rows[-1]["outcome"]["state"] == "healthy"
    assert "nothing to restore" in serving.terminal(MANTA, "apps", "restore").stderr
