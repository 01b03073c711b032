"""New versions beside the old ones, under names and routes of their own, for as long as needed."""

from __future__ import annotations

import contextlib
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from manta.cluster.record import ClusterRecord
from manta.serving.access import owner
from manta.serving.apps import deploy
from manta.serving.apps.deploy import NotHealthy, Say
from manta.serving.apps.lock import Lock
from manta.serving.apps.plan import CANDIDATE, ServeState, candidate_route, plan_candidates
from manta.serving.canary.probe import Endpoint, failures
from manta.serving.canary.traffic import VERSION_HEADER
from manta.spec.probes import Probe

GONE_TIMEOUT_S = 120.0
ALIVE_S = 5.0
"""Longest time to any answer of a candidate's guard."""

# The endpoint is the cluster's own; a proxy from the environment has no business in between.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@contextlib.contextmanager
def beside(
    cluster: ClusterRecord,
    lock: Lock,
    apps: Sequence[Mapping[str, Any]],
    say: Say,
    timeout_s: float,
) -> Iterator[ServeState]:
    """Candidates of these applications run during the block, which gets what Serve runs then.

    Raises:
        NotHealthy: one does not become healthy.
        MantaError: Serve refuses them, or they do not go away after the block.
    """
    candidates = [f"{app['name']}{CANDIDATE}" for app in apps]
    lock.check()
    try:
        deploy.send(cluster, plan_candidates(deploy.state(cluster), apps))
        yield deploy.wait_healthy(cluster, candidates, say, timeout_s)
    finally:
        lock.check()
        deploy.send(cluster, plan_candidates(deploy.state(cluster), ()))
        for candidate in candidates:
            deploy.wait_gone(cluster, candidate, GONE_TIMEOUT_S)  # the new version needs its room


def require_deployments(state: ServeState, name: str) -> None:
    """Raise NotHealthy if a candidate lacks a deployment that runs: it could not replace it.

    Serve would stop that one before the new ones are ready, and a deploy with surge refuses that.
    """
    running, new = state.app(name), state.app(f"{name}{CANDIDATE}")
    has = [one.name for one in new.deployments] if new else []
    lost = [one.name for one in running.deployments if one.name not in has] if running else []
    if lost:
        what = f"the new version of `{name}` has no deployment `{lost[0]}`, only {', '.join(has)}"
        fix = "give it another name and route, or accept a gap with --interrupt"
        raise NotHealthy(what, what, fix)


def require_answer(url: str, name: str) -> None:
    """Raise NotHealthy if a candidate's guard does not answer anything.

    Where no replica is left Serve's proxy holds requests back until there is one again.
    """
    try:
        with _OPENER.open(f"{url}{candidate_route(name)}/health", timeout=ALIVE_S) as answer:
            headers = answer.headers
    except urllib.error.HTTPError as error:  # no key was shown; saying so is an answer
        headers = error.headers
    except OSError:
        headers = {}
    if not headers.get(VERSION_HEADER):
        what = f"the new version of `{name}` does not answer any more"
        raise NotHealthy(what, what)


def ask(
    cluster: ClusterRecord, url: str, app: Mapping[str, Any], probes: Sequence[Probe], say: Say
) -> None:
    """Ask the candidate of an application. Raises NotHealthy if an answer is not as it must be.

    Args:
        cluster: where it runs.
        url: of Serve.
        app: the new version's entry of the Serve config.
        probes: of all applications; those of this one are asked.
        say: told if all is well.
    """
    name = str(app["name"])
    own = [one for one in probes if one.app in (None, name)]
    key = owner.ensure_key(cluster).read_text().strip() if owner.is_guarded(app) else None
    endpoint = Endpoint(url=url + candidate_route(name), key=key)
    if faults := failures(endpoint, own):
        told = "\n".join(["", *faults])
        what = f"`{name}` fails {len(faults)} of {len(own)} checks"
        raise NotHealthy(f"{what}{told}", f"{what}: {faults[0]}")
    say(f"`{name}` passes {len(own)} checks")
