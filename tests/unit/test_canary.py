"""Requests that are shared out between a running version and a candidate, over real servers."""

from __future__ import annotations

import asyncio
import functools
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner
from real_server import served, until

from manta import storage
from manta.cli.main import cli
from manta.cluster.record import ClusterRecord
from manta.errors import MantaError
from manta.serving.access import key_store, keys, usage
from manta.serving.apps import lock
from manta.serving.apps.plan import ServeState
from manta.serving.canary import canary, candidate, conductor, splitter, traffic
from manta.serving.canary.canary import Fare
from manta.serving.canary.splitter import TOKEN, VERSION, Splitter
from manta.serving.canary.traffic import Order, Seen
from manta.serving.guard.guard import Guard
from manta.serving.guard.limiter import LocalLimiter
from manta.serving.telemetry.vitals import Vitals, VitalsWriter, worse
from manta.spec.guard import GuardConfig, Limits

Test = Callable[..., Coroutine[Any, Any, None]]


def in_loop(test: Test) -> Callable[..., None]:
    """Runs an async test."""

    @functools.wraps(test)
    def run(**fixtures: Any) -> None:
        asyncio.run(test(**fixtures))

    return run


CHAT = "/v1/chat/completions"


class Engine:
    """Answers with its name, with `status`, or with a stream that breaks off."""

    def __init__(self, name: str) -> None:
        self.name, self.status, self.is_cut = name, 200, False
        self.bodies: list[dict[str, Any]] = []
        self.hold = asyncio.Event()
        self.hold.set()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = json.loads((await receive()).get("body") or b"{}")
        self.bodies.append(body)
        await self.hold.wait()
        kind = b"text/event-stream" if body.get("stream") else b"application/json"
        headers = [(b"content-type", kind)]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        if body.get("stream"):
            for word in ("a", "b"):
                event = f"data: {json.dumps({'choices': [{'text': word}]})}\n\n".encode()
                await send({"type": "http.response.body", "body": event, "more_body": True})
                if self.is_cut:
                    raise RuntimeError("an engine that dies")
        told = {"choices": [{"text": self.name}], "usage": {"completion_tokens": 3}}
        last = b"data: [DONE]\n\n" if body.get("stream") else json.dumps(told).encode()
        await send({"type": "http.response.body", "body": last})


class Pair:
    """A running version and a candidate behind guards of their own, over one storage."""

    def __init__(self, root: Path, **config: Any) -> None:
        self.root = str(root)
        self.old, self.new = Engine("old"), Engine("new")
        self.running, self.split = self._guard(self.old, "r", "app", config)
        self.candidate, self.candidate_split = self._guard(self.new, "c", "app--candidate", config)
        self.client: httpx.AsyncClient
        self.url = ""

    def _guard(
        self, engine: Engine, replica: str, application: str, config: dict[str, Any]
    ) -> tuple[Guard, Splitter]:
        split = Splitter(self.root, replica, application, limit_s=5)
        guard = Guard(
            engine,
            GuardConfig(**config),
            key_store.KeyTable(self.root),
            LocalLimiter(replica),
            usage.Ledger(self.root, {}),
            VitalsWriter(self.root, replica),
            split=split,
        )
        return guard, split

    def order(self, number: int = 1, **changes: Any) -> None:
        """Tell both what a deploy would."""
        order = Order(**{"number": number, "url": self.url, "token": "t" * 32, **changes})
        traffic.write_order(self.root, "r", order)
        traffic.write_order(self.root, "c", Order(number=number, token=order.token))
        self.look()

    def look(self) -> None:
        self.split.refresh()
        self.candidate_split.refresh()

    def seen(self) -> Seen:
        self.look()
        found = traffic.read_seen(self.root, "r")
        assert found is not None
        return found

    def key(self, **limits: int) -> str:
        key, secret = keys.make(name="a", owner="me", now=time.time(), limits=Limits(**limits))
        key_store.save(self.root, key)
        return secret

    async def ask(self, secret: str = "", **body: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {secret}"} if secret else {}
        return await self.client.post(CHAT, json={"model": "m", **body}, headers=headers)

    async def names(self, number: int, secret: str = "") -> Counter[str]:
        return Counter([name_of(await self.ask(secret)) for _ in range(number)])

    async def used(self) -> int:
        """Requests that are billed to anybody."""
        for guard in (self.running, self.candidate):
            await guard.stop()
        rows = usage.read(self.root, usage.month_of(time.time()))
        return sum(row.num_requests for row in rows)


def name_of(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


@asynccontextmanager
async def pair(root: Path, **config: Any) -> AsyncIterator[Pair]:
    made = Pair(root, **{"keys": "none", **config})
    async with served(made.running) as url, served(made.candidate) as candidate_url:
        made.url = candidate_url
        async with httpx.AsyncClient(base_url=url, timeout=20) as made.client:
            try:
                yield made
            finally:
                await made.running.stop()
                await made.candidate.stop()


# --- who gets the candidate ------------------------------------------------------------------


def test_about_the_wanted_share_is_drawn_and_a_higher_weight_takes_nobody_back() -> None:
    places = [traffic.place("token", f"key {number}".encode()) for number in range(4000)]
    for weight in (0.1, 0.5):
        share = sum(place < weight for place in places) / len(places)
        assert abs(share - weight) < 0.03
    assert all(0 <= place < 1 for place in places)
    again = [traffic.place("token", f"key {number}".encode()) for number in range(4000)]
    other = [traffic.place("other", f"key {number}".encode()) for number in range(4000)]
    assert again == places
    assert sum(a < 0.5 and b < 0.5 for a, b in zip(places, other, strict=True)) < 1200


@in_loop
async def test_a_key_sees_one_version_and_at_a_higher_weight_no_key_goes_back(
    tmp_path: Path,
) -> None:
    async with pair(tmp_path, keys="required") as both:
        secrets = [both.key() for _ in range(12)]
        drawn: list[set[str]] = []
        for number, weight in enumerate((0.3, 0.7), 1):
            both.order(number, weight=weight)
            answers = {secret: await both.names(3, secret) for secret in secrets}
            assert all(len(names) == 1 for names in answers.values())
            drawn.append({secret for secret, names in answers.items() if "new" in names})
        assert drawn[0] <= drawn[1] < set(secrets)
        assert drawn[1]


@in_loop
async def test_without_keys_each_request_is_drawn_and_other_routes_stay(tmp_path: Path) -> None:
    async with pair(tmp_path) as both:
        both.order(weight=0.5)
        names = await both.names(60)
        assert 10 < names["new"] < 50
        both.order(2, weight=1)
        for number in range(5):
            answer = await both.client.post("/v1/load_lora_adapter", json={"number": number})
            assert VERSION.decode() not in answer.headers
        answer = await both.ask()
        assert answer.headers[VERSION.decode()] == "candidate"
        assert both.seen() == Seen(number=2, num_sent=names["new"] + 1)


# --- nobody is worse off ---------------------------------------------------------------------


@in_loop
async def test_a_killed_deploy_gives_everything_back_and_one_that_goes_on_takes_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(traffic, "EXPIRY_S", 0.3)
    async with pair(tmp_path) as both:
        both.order(7, weight=1)
        assert await both.names(3) == {"new": 3}
        await asyncio.sleep(0.4)  # the order lies there, and nobody repeats it
        for _ in range(2):
            both.look()
            assert await both.names(3) == {"old": 3}
        both.order(8, weight=1)
        assert await both.names(3) == {"new": 3}
        await asyncio.sleep(0.4)
        storage.delete(f"{both.root}/traffic/r.json")
        both.look()
        assert await both.names(3) == {"old": 3}


@pytest.mark.parametrize("status", [500, 503, 404, 400])
@in_loop
async def test_what_only_the_candidate_refuses_the_running_version_answers(
    tmp_path: Path, status: int
) -> None:
    async with pair(tmp_path) as both:
        both.order(weight=1)
        both.new.status = status
        assert await both.names(5) == {"old": 5}
        assert len(both.new.bodies) == 5
        assert both.seen() == Seen(number=1, num_sent=5, num_failed=5)


@in_loop
async def test_what_both_refuse_is_the_clients_own_fault(tmp_path: Path) -> None:
    async with pair(tmp_path) as both:
        both.order(weight=1)
        both.new.status = both.old.status = 404
        assert [(await both.ask()).status_code for _ in range(3)] == [404] * 3
        assert both.seen() == Seen(number=1, num_sent=3)


@in_loop
async def test_a_candidate_that_is_gone_loses_no_request(tmp_path: Path) -> None:
    async with pair(tmp_path) as both, served(only_a_proxy) as proxy:
        both.order(weight=1, url="http://127.0.0.1:9")
        assert await both.names(3) == {"old": 3}
        both.order(2, weight=1, url=proxy)
        assert await both.names(3) == {"old": 3}
        assert both.seen() == Seen(number=2, num_sent=6, num_failed=6)


async def only_a_proxy(scope: Any, receive: Any, send: Any) -> None:
    """Answers 200 by itself: the mark of a candidate is missing."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"welcome"})


@in_loop
async def test_streams_come_through_whole_and_as_the_client_asked_for_them(
    tmp_path: Path,
) -> None:
    async with pair(tmp_path) as both:
        both.order(weight=1)
        answer = await both.ask(stream=True)
        assert answer.text.count("data: ") == 3
        # The candidate's guard asks for use itself, and takes it out again.
        assert both.new.bodies == [
            {"model": "m", "stream": True, "stream_options": {"include_usage": True}}
        ]
        both.new.is_cut = True
        with pytest.raises(httpx.RemoteProtocolError):
            await both.ask(stream=True)
        assert both.old.bodies == []
        assert both.seen() == Seen(number=1, num_sent=2, num_failed=1)


@in_loop
async def test_a_candidate_has_not_more_time_than_its_guard_would_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(splitter, "GRACE_S", -4.5)  # of 5 s
    async with pair(tmp_path) as both, served(stuck) as url:
        both.order(weight=1, url=url)
        assert (await both.ask()).status_code == 504
        with pytest.raises(httpx.RemoteProtocolError):
            await both.ask(stream=True)
        assert both.old.bodies == []
        assert both.seen() == Seen(number=1, num_sent=2, num_failed=2)


async def stuck(scope: Any, receive: Any, send: Any) -> None:
    """A candidate that begins a stream, at most."""
    if b"stream" in (await receive())["body"]:
        headers = [(VERSION, b"candidate")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"data: a\n\n", "more_body": True})
    await asyncio.sleep(60)


@in_loop
async def test_what_is_on_its_way_is_told_until_it_has_ended(tmp_path: Path) -> None:
    async with pair(tmp_path) as both:
        both.order(weight=1)
        both.new.hold.clear()
        asked = asyncio.create_task(both.ask())
        await until(lambda: both.seen().num_open == 1)
        both.order(2, weight=0)
        assert await both.names(1) == {"old": 1}
        both.new.hold.set()
        assert name_of(await asked) == "new"
        assert both.seen() == Seen(number=2, num_sent=1)


@in_loop
async def test_what_a_candidate_that_hangs_has_not_begun_is_taken_back_from_it(
    tmp_path: Path,
) -> None:
    async with pair(tmp_path) as both:
        both.order(weight=1)
        stream = asyncio.create_task(both.ask(stream=True))
        assert name_of(await both.ask()) == "new"
        await stream
        both.new.hold.clear()
        asked = [asyncio.create_task(both.ask()) for _ in range(4)]
        await until(lambda: both.seen().num_open == 4)
        both.order(2, weight=0, abandon=True)
        assert [name_of(await one) for one in asked] == ["old"] * 4
        assert both.seen() == Seen(number=2, num_sent=6, num_failed=4)


# --- what it counts --------------------------------------------------------------------------


@in_loop
async def test_a_request_that_is_sent_on_is_checked_limited_and_billed_once(
    tmp_path: Path,
) -> None:
    async with pair(tmp_path, keys="required") as both:
        secret = both.key(requests_per_min=4)
        both.order(weight=1)
        assert (await both.ask("wrong")).status_code == 401
        assert await both.names(4, secret) == {"new": 4}
        assert (await both.ask(secret)).status_code == 429
        assert both.old.bodies == []
        assert await both.used() == 4


@in_loop
async def test_what_the_candidate_failed_is_use_once(tmp_path: Path) -> None:
    async with pair(tmp_path, keys="required") as both:
        secret = both.key()
        both.order(weight=1)
        both.new.status = 500
        assert await both.names(4, secret) == {"old": 4}
        assert await both.used() == 4


@in_loop
async def test_copies_reach_the_candidate_and_count_for_nobody(tmp_path: Path) -> None:
    async with pair(tmp_path, keys="required", log_prompts={"sample": 1}) as both:
        secret = both.key(requests_per_min=6)
        both.order(shadow=1)
        assert await both.names(6, secret) == {"old": 6}
        await until(lambda: both.seen().num_sent == 6)
        assert both.seen() == Seen(number=1, num_sent=6)
        assert len(both.new.bodies) == 6
        assert await both.used() == 6
        logged = [Path(url).read_text() for url in storage.glob(f"{both.root}/prompts/**")]
        assert sum(text.count("\n") for text in logged) == 6


@in_loop
async def test_copies_that_fail_or_hang_are_felt_by_no_user(tmp_path: Path) -> None:
    async with pair(tmp_path) as both:
        both.order(shadow=1)
        both.new.status = 500
        assert await both.names(5) == {"old": 5}
        await until(lambda: both.seen().num_sent == 5)
        assert both.seen().num_failed == 5
        both.new.hold.clear()
        assert await both.names(40) == {"old": 40}
        await until(lambda: len(both.new.bodies) == 5 + 16)  # the most at once
        assert await both.names(5) == {"old": 5}
        both.new.hold.set()


@in_loop
async def test_nobody_can_make_a_request_of_theirs_a_copy(tmp_path: Path) -> None:
    async with pair(tmp_path, keys="required") as both:
        secret = both.key()
        both.order(shadow=0.5)
        headers = {"authorization": f"Bearer {secret}", TOKEN.decode(): "x" * 32}
        async with httpx.AsyncClient(base_url=both.url, headers=headers) as direct:
            for _ in range(3):
                assert (await direct.post(CHAT, json={"model": "m"})).status_code == 200
        headers[TOKEN.decode()] = "t" * 32
        for _ in range(2):  # nor at the running version, whatever they know
            answer = await both.client.post(CHAT, json={"model": "m"}, headers=headers)
            assert answer.status_code == 200
        assert await both.used() == 5


# --- a whole roll-out ------------------------------------------------------------------------


class Serve:
    """Ray Serve's REST API, as far as it tells what runs, and its ingress for one route."""

    def __init__(self, both: Pair) -> None:
        self.both = both
        self.status = "RUNNING"

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["path"].startswith("/-candidate/app"):
            inner = {**scope, "path": scope["path"].removeprefix("/-candidate/app")}
            await self.both.candidate(inner, receive, send)
            return
        port = scope["server"][1]
        details = {
            "http_options": {"host": "127.0.0.1", "port": port},
            "applications": {
                "app": application("r", "RUNNING"),
                "app--candidate": application("c", self.status),
                "plain": application("p", "RUNNING"),
            },
        }
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps(details).encode()})


def application(replica: str, status: str) -> dict[str, Any]:
    deployment = {
        "name": "D",
        "status": "HEALTHY",
        "message": "",
        "target_num_replicas": 1,
        "replicas": [{"state": "RUNNING", "replica_id": replica}],
    }
    return {
        "status": status,
        "message": "",
        "route_prefix": "/",
        "deployed_app_config": {},
        "deployments": {"D": deployment},
    }


class Rollout:
    """A pair that a deploy conducts, while somebody asks it all the time."""

    def __init__(self, both: Pair, url: str) -> None:
        self.both, self.url = both, url
        self.serve: Serve
        self.said: list[str] = []
        self.names: list[str] = []
        self.cluster = ClusterRecord(
            name="c",
            cluster_id="c",
            pid=1,
            dashboard_url=url,
            storage_url=both.root,
            **dict.fromkeys(("gcs_address", "serve_url", "token_path", "temp_dir"), ""),
            started_at="",
        )

    async def ask(self) -> None:
        while True:
            self.names.append(name_of(await self.both.ask()))

    async def run(self, names: tuple[str, ...] = ("app",), **steps: Any) -> None:
        await asyncio.to_thread(self._run, names, canary.Canary(**{"step_s": 0.2, **steps}))

    def _run(self, names: tuple[str, ...], steps: canary.Canary) -> None:
        with (
            lock.held(self.cluster, "deploy", print) as held,
            conductor.conducting(self.cluster, held, names, steps.by) as conducts,
        ):
            conducts.require_guards()
            canary.take_over(self.cluster, conducts, names, self.url, steps, self.said.append)


@asynccontextmanager
async def rollout(
    root: Path, monkeypatch: pytest.MonkeyPatch, *, asked: bool = True
) -> AsyncIterator[Rollout]:
    monkeypatch.setattr(splitter, "POLL_S", 0.05)
    monkeypatch.setattr(canary, "LOOK_S", 0.1)
    monkeypatch.setattr(conductor, "HEARD_S", 1.0)
    async with pair(root) as both, served(serve := Serve(both)) as url:
        made = Rollout(both, url)
        made.serve = serve
        await both.ask()  # the guards look for orders from their first request on
        asking = asyncio.create_task(made.ask() if asked else asyncio.sleep(0))
        try:
            yield made
        finally:
            asking.cancel()


@in_loop
async def test_a_good_candidate_takes_over_step_by_step_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with rollout(tmp_path, monkeypatch) as one:
        await one.run(shadow=1.0, weights=(0.5, 1.0), max_latency_ratio=100)
        assert one.said[::2] == [
            "the new version is asked copies of 100% of the requests",
            "the new version answers 50% of the requests",
            "the new version answers 100% of the requests",
        ]
        assert all(line.startswith("`app`: 0 of ") for line in one.said[1::2])
        assert set(one.names) == {"old", "new"}
        assert await one.both.names(5) == {"old": 5}
        assert storage.glob(f"{one.both.root}/traffic/*") == []


@in_loop
async def test_a_candidate_that_fails_is_ended_and_users_have_not_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with rollout(tmp_path, monkeypatch) as one:
        one.both.new.status = 500
        with pytest.raises(MantaError, match="new version of `app` is worse: "):
            await one.run(weights=(1.0,), step_s=60)
        assert set(one.names) == {"old"}
        assert storage.glob(f"{one.both.root}/traffic/*") == []


@in_loop
async def test_a_candidate_that_is_unhealthy_or_silent_is_ended_and_waits_are_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with rollout(tmp_path, monkeypatch) as one:
        one.serve.status = "UNHEALTHY"
        with pytest.raises(MantaError, match="new version of `app` is unhealthy"):
            await one.run(weights=(1.0,), step_s=60)
        one.serve.status = "RUNNING"
        monkeypatch.setattr(candidate, "ALIVE_S", 0.5)
        one.both.new.hold.clear()
        one.names.clear()
        with pytest.raises(MantaError, match="new version of `app` does not answer any more"):
            await one.run(weights=(1.0,), step_s=60)
        await until(lambda: one.names)
        assert set(one.names) == {"old"}


@in_loop
async def test_without_requests_a_roll_out_ends_unless_it_shall_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with rollout(tmp_path, monkeypatch, asked=False) as one:
        with pytest.raises(MantaError) as refused:
            await one.run(weights=(0.5,))
        assert "the new version of `app` got 0 requests in" in refused.value.what
        assert "--canary-by request" in refused.value.fix
        await one.run(weights=(0.5,), min_requests=0)
        assert one.said[-1].startswith("`app`: 0 of 0 requests failed")


@in_loop
async def test_an_application_without_a_guard_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with rollout(tmp_path, monkeypatch, asked=False) as one:
        with pytest.raises(MantaError, match="`plain` has no guard that could share its requests"):
            await one.run(names=("plain",), weights=(0.5,))
        with pytest.raises(MantaError, match="no replica of `other` runs"):
            await one.run(names=("other",), weights=(0.5,))


# --- the judgement ---------------------------------------------------------------------------


def fare(
    *, sent: int = 100, failed: int = 0, bucket: int = 10, old: int = 100, old_failed: int = 0
) -> Fare:
    return Fare(
        running=Vitals(num_requests=old, num_errors=old_failed, buckets=((10, old),)),
        candidate=Vitals(num_requests=sent, num_errors=failed, buckets=((bucket, sent),)),
        when="before",
    )


def judged(one: Fare, **changes: Any) -> str | None:
    return worse(one.running, one.candidate, 0.01, 1.5, when=one.when, **changes)


def test_a_candidate_is_compared_with_what_ran_at_the_same_time() -> None:
    before = fare(sent=10, old=10_000, old_failed=5_000)
    now = fare(sent=110, failed=3, old=10_100, old_failed=5_000)
    step = canary.since(before, now)
    assert (step.candidate.num_requests, step.candidate.num_errors) == (100, 3)
    assert (step.running.num_requests, step.running.num_errors) == (100, 0)
    assert "3 of 100 requests fail (3.0%); meanwhile with the running version, 0.0% did" in str(
        judged(step)
    )
    assert judged(replace(step, running=Vitals(num_requests=100, num_errors=3))) is None


def test_where_the_running_version_is_asked_no_more_all_that_is_known_of_it_counts() -> None:
    step = canary.since(fare(sent=0, old=1000), fare(sent=500, bucket=30, old=1000))
    assert step.running.num_requests == 1000
    assert "with the running version since its start, after" in str(judged(step))


def test_little_that_is_known_says_nothing_until_the_step_ends() -> None:
    few = fare(sent=5, failed=2)
    assert judged(few) is None
    assert "2 of 5" in str(judged(few, min_requests=1))
    assert canary.too_few({"a": few, "b": fare()}, 20) == ["a"]
    assert canary.too_few({"a": few}, 0) == []


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8100"),
        ("0.0.0.0", "http://127.0.0.1:8100"),
        ("10.0.0.7", "http://10.0.0.7:8100"),
        ("fd00::1", "http://[fd00::1]:8100"),
    ],
)
def test_a_candidate_is_asked_through_the_ingress_of_the_replicas_own_node(
    host: str, url: str
) -> None:
    assert conductor.address(ServeState(http_host=host, http_port=8100)) == url


@pytest.mark.parametrize("text", ["50,10", "0", "10,10", "101", "ten", "", "10,nan"])
def test_weights_that_do_not_rise_are_refused(text: str) -> None:
    done = CliRunner().invoke(cli, ["deploy", "x.yaml", "--canary", text])
    assert "not rising percents up to 100; write e.g. --canary 10,50" in str(done.exception)
