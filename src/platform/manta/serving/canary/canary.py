"""A new version takes over step by step, and is judged by its users' requests at each."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from manta.cluster.record import ClusterRecord
from manta.serving.apps import deploy
from manta.serving.apps.deploy import NotHealthy, Say
from manta.serving.apps.plan import CANDIDATE, App
from manta.serving.canary import candidate
from manta.serving.canary.conductor import Conductor
from manta.serving.canary.traffic import By
from manta.serving.telemetry import vitals
from manta.serving.telemetry.vitals import Vitals

PATIENCE = 3
"""Times the length of a step after which it ends, though too few have asked."""
LOOK_S = 2.0


@dataclass(frozen=True, kw_only=True)
class Canary:
    """How a new version takes over."""

    weights: tuple[float, ...] = ()
    """Share of the requests that it answers at each step, rising, up to 1."""
    shadow: float = 0.0
    """Share of which it is asked a copy before that, whose answers nobody gets."""
    step_s: float = 60.0
    """Shortest time of a step."""
    by: By = "key"
    min_requests: int = vitals.MIN_REQUESTS
    """It must have been asked so often in a step before the next; 0 goes on without."""
    max_error_rate: float = 0.01
    """As in vitals.worse."""
    max_latency_ratio: float = 1.5


@dataclass(frozen=True, kw_only=True)
class Fare:
    """How both versions of an application did in one step."""

    running: Vitals
    candidate: Vitals
    when: str
    """What the running version's figures are from."""


def take_over(
    cluster: ClusterRecord,
    conductor: Conductor,
    names: Sequence[str],
    url: str,
    canary: Canary,
    say: Say,
) -> None:
    """Walk through all steps; when this returns, the running versions answer everything again.

    Args:
        cluster: where the candidates run.
        conductor: shares their requests out.
        names: applications.
        url: of Serve, from here.
        canary: the steps.
        say: told how they did.

    Raises:
        NotHealthy: a candidate is worse, failed, or was asked too little to tell.
        MantaError: Serve or the storage cannot be reached, or another deploy has taken over.
    """
    shares = [(0.0, canary.shadow)] if canary.shadow else []
    shares += [(weight, 0.0) for weight in canary.weights]
    before: dict[str, Fare] = {}
    try:
        for weight, shadow in shares:
            before = {name: read(cluster, conductor, name) for name in names}
            conductor.share(weight, shadow)
            say(_told(weight, shadow))
            for name, fare in _step(cluster, conductor, before, url, canary).items():
                say(describe(name, fare))
        conductor.rest()
        for name, earlier in before.items():  # what had begun has ended now, one way or another
            fare = since(earlier, read(cluster, conductor, name))
            _require_good(name, fare, canary, min_requests=1)
    finally:
        conductor.rest(abandon=True)


def _told(weight: float, shadow: float) -> str:
    if shadow:
        return f"the new version is asked copies of {shadow:.0%} of the requests"
    return f"the new version answers {weight:.0%} of the requests"


def _step(
    cluster: ClusterRecord,
    conductor: Conductor,
    before: Mapping[str, Fare],
    url: str,
    canary: Canary,
) -> dict[str, Fare]:
    """Watch until enough is known; how both versions of each application did."""
    began = time.monotonic()
    while True:
        time.sleep(min(LOOK_S, canary.step_s))
        state = deploy.patient_state(cluster)
        fares = {}
        for name, earlier in before.items():
            _require_alive(name, state.app(f"{name}{CANDIDATE}"))
            candidate.require_answer(url, name)
            fares[name] = since(earlier, read(cluster, conductor, name))
            _require_good(name, fares[name], canary)
        lasted = time.monotonic() - began
        few = too_few(fares, canary.min_requests)
        if lasted >= canary.step_s and not few:
            break
        if lasted >= PATIENCE * canary.step_s:
            raise _unknown(few[0], fares[few[0]], lasted, canary)
    for name, fare in fares.items():  # little that speaks against it is enough
        _require_good(name, fare, canary, min_requests=1)
    return fares


def read(cluster: ClusterRecord, conductor: Conductor, name: str) -> Fare:
    """How both versions did since their replicas started.

    Whether the candidate failed a request is what the running version's guards saw of it: one
    that crashes tells nothing itself. How fast it was is its own guard's word, since the way
    there is not the running version's.
    """
    seen, root = conductor.seen(name), cluster.storage_url
    own = vitals.read(root, conductor.candidates(name))
    new = replace(own, num_requests=seen.num_sent, num_errors=seen.num_failed)
    running = vitals.read(root, conductor.replicas(name))
    return Fare(running=running, candidate=new, when="before")


def since(before: Fare, now: Fare) -> Fare:
    """What came between; of a running version that was hardly asked, all that is known."""
    running, when = now.running.minus(before.running), "meanwhile with the running version"
    known = min(running.num_requests, running.num_latencies) >= vitals.MIN_LATENCIES
    if not known and now.running.num_requests > running.num_requests:
        running, when = now.running, "with the running version since its start"
    return Fare(running=running, candidate=now.candidate.minus(before.candidate), when=when)


def too_few(fares: Mapping[str, Fare], min_requests: int) -> list[str]:
    """Applications whose candidates were asked less often."""
    return [name for name, fare in fares.items() if fare.candidate.num_requests < min_requests]


def describe(name: str, fare: Fare) -> str:
    """One line on a step."""
    return f"`{name}`: {_figures(fare.candidate)}; {fare.when}: {_figures(fare.running)}"


def _figures(one: Vitals) -> str:
    speed = f", first byte after {one.p95_s:.2f} s (p95)" if one.num_latencies else ""
    return f"{one.num_errors} of {one.num_requests} requests failed{speed}"


def _require_alive(name: str, app: App | None) -> None:
    if app is None:
        how = "was removed by somebody else"
    elif app.status in ("DEPLOY_FAILED", "UNHEALTHY"):
        how = f"is {app.status.lower().replace('_', ' ')}"
    elif any(one.target_num_replicas and not one.num_replicas for one in app.deployments):
        how = "has lost its replicas"
    else:
        return
    what = f"the new version of `{name}` {how}"
    raise NotHealthy(f"{what}: {app.message.strip()}" if app and app.message else what, what)


def _require_good(
    name: str, fare: Fare, canary: Canary, min_requests: int = vitals.MIN_REQUESTS
) -> None:
    fault = vitals.worse(
        fare.running,
        fare.candidate,
        canary.max_error_rate,
        canary.max_latency_ratio,
        when=fare.when,
        min_requests=min_requests,
    )
    if fault:
        what = f"the new version of `{name}` is worse: {fault}"
        raise NotHealthy(what, what)


def _unknown(name: str, fare: Fare, lasted_s: float, canary: Canary) -> NotHealthy:
    asked = fare.candidate.num_requests
    what = (
        f"the new version of `{name}` got {asked} requests in {lasted_s:.0f} s, "
        f"{canary.min_requests} are needed to judge it"
    )
    other = "longer steps (--step-s), --min-requests 0 to go on without"
    by_key = ", or --canary-by request if few keys ask" if canary.by == "key" else ""
    return NotHealthy(what, what, f"try {other}{by_key}")
