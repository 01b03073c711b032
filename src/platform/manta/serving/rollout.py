"""Changes of applications that are safe: locked, noted, waited for, and undone when they fail."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from manta.check import secrets
from manta.cluster.record import ClusterRecord
from manta.errors import InputError, MantaError
from manta.serving.access import owner
from manta.serving.apps import deploy, history, lock, models, places, surge
from manta.serving.apps.config import ServeConfig
from manta.serving.apps.deploy import NotHealthy, Say
from manta.serving.apps.history import Action, Version
from manta.serving.apps.lock import Lock, LockLost
from manta.serving.apps.plan import DeployPlan, ServeState, plan_restore, plan_undeploy
from manta.serving.canary import canary, candidate
from manta.serving.canary.canary import Canary
from manta.serving.canary.candidate import GONE_TIMEOUT_S
from manta.serving.canary.conductor import conducting
from manta.serving.telemetry import vitals
from manta.serving.telemetry.vitals import Vitals
from manta.spec.probes import Probe

OBSERVE_EACH_S = 2.0

_Vitals = dict[str, Vitals]


@dataclass(frozen=True, kw_only=True)
class Options:
    """How careful a change is."""

    timeout_s: float = 900
    """Longest wait for it to be healthy, and once more for going back."""
    go_back: bool = True
    """Restore what ran before if it does not become healthy."""
    interrupt: bool = False
    """Old replicas may stop before new ones are ready: for a cluster without room for both."""
    probes: tuple[Probe, ...] = ()
    """Asked of a candidate before anything that runs is touched."""
    observe_s: float = 0
    """How long the new version is compared with the old one under the users' own requests."""
    max_error_rate: float = 0.01
    """Share of requests by which more may fail than did before."""
    max_latency_ratio: float = 1.5
    """Of the 95th percentiles of the time to the first byte, new over old."""
    canary: Canary | None = None
    """How the new version takes over; None is all at once."""


@dataclass(frozen=True, kw_only=True)
class _Change:
    """One change under way, of one or several applications."""

    cluster: ClusterRecord
    lock: Lock
    before: ServeState
    plan: DeployPlan
    options: Options
    say: Say

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.plan.added, *self.plan.changed)


def deploy_file(
    cluster: ClusterRecord,
    file: str,
    say: Say,
    options: Options = Options(),
) -> DeployPlan:
    """Deploy a Serve config; returns when its applications answer.

    Interrupting the wait leaves the deploy going; then nobody goes back.

    Raises:
        InputError: the file does not hold, does not fit what runs, or a model is damaged.
        MantaError: another deploy is at work, or this one failed; the message says what runs now.
    """
    wanted = deploy.read(cluster, file)
    with lock.held(cluster, f"deploy {file}", say) as held:
        before = deploy.state(cluster)
        plan = deploy.plan(cluster, wanted, before, surge=not options.interrupt)
        for note in plan.notes:
            say(note)
        change = _Change(
            cluster=cluster, lock=held, before=before, plan=plan, options=options, say=say
        )
        _carry_out(change, "deploy", None)
    return plan


def choose_version(cluster: ClusterRecord, app: str, number: int | None) -> Version:
    """The version that a rollback of `app` would go back to: `number`, or the one before.

    Raises:
        InputError: there is none, or its model's weights are no longer in the storage.
    """
    versions = history.read(places.home(cluster), app)
    if not versions:
        known = ", ".join(history.apps(places.home(cluster)))
        raise InputError(f"`{app}` has no history", f"known: {known}" if known else "")
    if number is not None:
        chosen = history.numbered(versions, number)
    else:
        running = deploy.state(cluster).app(app)
        config = running.config_passthrough if running else None
        chosen = history.before(versions, history.find(config, versions))
    if lost := models.gone(chosen.config_passthrough or {}, cluster.storage_url):
        raise InputError(
            f"version {chosen.number} of `{app}` served other weights of model "
            f"`{', '.join(lost)}` than the storage has now",
            "models are kept by name: choose another version, or deploy its file with these",
        )
    return chosen


def roll_back(
    cluster: ClusterRecord,
    app: str,
    to: int | None,
    say: Say,
    options: Options = Options(),
) -> Version:
    """Go back to an earlier version of an application, with the same care as a deploy.

    Raises:
        InputError: there is no such version, or it cannot run any more.
        MantaError: as `deploy_file`.
    """
    with lock.held(cluster, f"rollback {app}", say) as held:
        chosen = choose_version(cluster, app, to)
        before = deploy.state(cluster)
        running = before.app(app)
        config = history.unmask(chosen, running.config_passthrough if running else None)
        wanted = ServeConfig(
            file=f"version {chosen.number}",
            applications_passthrough=(config,),
            options_passthrough={},
        )
        plan = deploy.plan(cluster, wanted, before, surge=not options.interrupt)
        change = _Change(
            cluster=cluster, lock=held, before=before, plan=plan, options=options, say=say
        )
        say(f"going back to version {chosen.number} of `{app}`")
        _carry_out(change, "rollback", chosen.number)
    return chosen


def undeploy(cluster: ClusterRecord, name: str, say: Say) -> None:
    """Remove one application and wait until it is gone; the others stay as they are.

    Raises:
        InputError: there is no such application, or it was not deployed from a config.
        MantaError: another deploy is at work, or it does not go.
    """
    with lock.held(cluster, f"undeploy {name}", say) as held:
        current = deploy.state(cluster)
        body = plan_undeploy(current, name)
        replaced = _running_version(cluster, current, name)
        version = history.begin(cluster, name, "undeploy", None, replaced=replaced)
        with _noted(cluster, [version], say):
            held.check()
            deploy.send(cluster, body)
            deploy.wait_gone(cluster, name, GONE_TIMEOUT_S)
        _end(cluster, [version], say, "removed")


def _carry_out(change: _Change, action: Action, of: int | None) -> None:
    cluster, say = change.cluster, change.say
    apps = change.plan.apps_passthrough
    for name, lines in change.plan.differences.items():
        for line in lines:
            say(f"{name}: {line}")
    _warn_of_secrets(apps, say)
    for name in change.names:
        models.verify(apps[name], cluster.storage_url)
    if any(owner.is_guarded(app) for app in apps.values()):
        say(f"callers need an API key; yours is in {owner.ensure_key(cluster)}")
    versions = [
        history.begin(
            cluster,
            name,
            action,
            apps[name],
            file=change.plan.file,
            replaced=_running_version(cluster, change.before, name),
            of=of,
        )
        for name in change.names
    ]
    old = _vitals(change, change.before)
    if change.names and (change.options.probes or change.options.canary):
        _try_out(change, [apps[name] for name in change.names], versions)
    with _noted(cluster, versions, say):
        try:
            change.lock.check()
            deploy.send(cluster, change.plan.body_passthrough)
            deploy.wait_healthy(cluster, change.plan.names, say, change.options.timeout_s)
            _observe(change, old)
        except LockLost:
            raise
        except MantaError as error:
            raise _undone(change, versions, error) from error
    _end(cluster, versions, say, "healthy")
    numbers = ", ".join(f"`{v.app}` is version {v.number}" for v in versions) or "nothing changed"
    say(f"running at {change.plan.url}: {numbers}")


def _try_out(
    change: _Change, apps: Sequence[Mapping[str, Any]], versions: Sequence[Version]
) -> None:
    """Run the new versions beside the old ones, ask them, let them answer; then remove them.

    Raises:
        MantaError: one is not healthy, answers otherwise than it must, or is worse. What ran runs.
    """
    again = ", and it answers everything again" if change.options.canary else ""
    untouched = f"nothing that runs was touched{again}"
    try:
        _beside(change, apps)
    except MantaError as error:
        _end(change.cluster, versions, change.say, "failed", _brief(error), untouched)
        raise MantaError(f"{error.what}\n{untouched}", error.fix) from error
    except KeyboardInterrupt:
        change.say(f"\nthe new version is removed; {untouched}")
        _end(change.cluster, versions, change.say, "left", "interrupted", untouched)
        raise


def _beside(change: _Change, apps: Sequence[Mapping[str, Any]]) -> None:
    cluster, say, options = change.cluster, change.say, change.options
    steps = options.canary
    shared, conductor = change.plan.changed, None
    with ExitStack() as during:
        if steps and shared:
            conductor = during.enter_context(conducting(cluster, change.lock, shared, steps.by))
            conductor.require_guards()
        now = during.enter_context(
            candidate.beside(cluster, change.lock, apps, say, options.timeout_s)
        )
        for name in () if options.interrupt else change.plan.changed:
            candidate.require_deployments(now, name)
        for app in apps if options.probes else ():
            candidate.ask(cluster, change.plan.url, app, options.probes, say)
        if steps and conductor:
            canary.take_over(cluster, conductor, shared, change.plan.url, steps, say)


def _vitals(change: _Change, state: ServeState, but: ServeState | None = None) -> _Vitals:
    """By application, how its replicas of `state` fare that `but` does not have."""
    found: dict[str, Vitals] = {}
    for name in change.names if change.options.observe_s else ():
        app, other = state.app(name), but.app(name) if but else None
        ids = (app.replicas if app else frozenset()) - (other.replicas if other else frozenset())
        found[name] = vitals.read(change.cluster.storage_url, ids)
    return found


def _observe(change: _Change, old: _Vitals) -> None:
    """Watch the new versions for a time. Raises NotHealthy if one is worse than the old."""
    options, new = change.options, _Vitals()
    deadline = time.monotonic() + options.observe_s
    if change.names and options.observe_s:
        change.say(f"watching for {options.observe_s:g} s")
    while change.names and time.monotonic() < deadline:
        time.sleep(min(OBSERVE_EACH_S, max(0.0, deadline - time.monotonic())))
        current = deploy.wait_healthy(
            change.cluster, change.names, lambda _: None, options.timeout_s
        )
        new = _vitals(change, current, but=change.before)
        for name, fare in new.items():
            limits = options.max_error_rate, options.max_latency_ratio
            if fault := vitals.worse(old[name], fare, *limits):
                what = f"`{name}` is worse than before: {fault}"
                raise NotHealthy(what, what)
    for name, fare in new.items():
        errors = f"{fare.num_errors} of {fare.num_requests} requests failed"
        change.say(f"`{name}`: {errors}, first byte after {fare.p95_s:.2f} s (p95)")


def _undone(change: _Change, versions: Sequence[Version], error: MantaError) -> MantaError:
    """Go back if that is wanted; the error that tells both."""
    short, what = _brief(error), error.what
    if found := surge.replaced_deployment(what):
        old, new = found
        short = f"the new version has no deployment `{old}`, only {new}"
        what = (
            f"{short}: Serve would stop `{old}` before the new one is ready. Give the application "
            "another name and route, or accept a gap with --interrupt"
        )
    if not change.names:
        return MantaError(what, "nothing was changed, so there is nothing to go back to")
    if not change.options.go_back:
        then = "left as it is, as --no-rollback says"
    else:
        change.say(f"{short}; going back")
        try:
            then = _go_back(change)
        except MantaError as second:
            then = f"could not go back: {_brief(second)}"
    _end(change.cluster, versions, change.say, "failed", short, then)
    return MantaError(f"{what}\n{then}", "see `manta apps history`")


def _brief(error: MantaError) -> str:
    return error.short if isinstance(error, NotHealthy) else error.what


def _go_back(change: _Change) -> str:
    """Restore what ran before, wait for it, and say so."""
    cluster, before, names = change.cluster, change.before, change.names
    change.lock.check()
    deploy.send(cluster, plan_restore(deploy.state(cluster), before, names))
    told = []
    for name in names:
        app = before.app(name)
        if app is None or app.config_passthrough is None:
            deploy.wait_gone(cluster, name, GONE_TIMEOUT_S)
            told.append(f"`{name}` did not run before and was removed")
        elif app.status != "RUNNING":
            told.append(f"`{name}` has its config of before, with which it was {app.status}")
        else:
            deploy.wait_healthy(cluster, [name], change.say, change.options.timeout_s)
            lost = models.gone(app.config_passthrough, cluster.storage_url)
            but = f", but new replicas load new weights of `{', '.join(lost)}`" if lost else ""
            told.append(f"`{name}` runs as before{but}")
    return "went back: " + "; ".join(told)


def _running_version(cluster: ClusterRecord, before: ServeState, name: str) -> int | None:
    """The version that runs; what was deployed past Manta becomes one now."""
    app = before.app(name)
    if app is None or app.config_passthrough is None:
        return None
    config: Mapping[str, object] = app.config_passthrough
    if known := history.find(config, history.read(places.home(cluster), name)):
        return known.number
    found = history.begin(cluster, name, "found", config)
    history.end(cluster, found, "healthy" if app.status == "RUNNING" else "failed", app.message)
    return found.number


@contextmanager
def _noted(cluster: ClusterRecord, versions: Sequence[Version], say: Say) -> Iterator[None]:
    """Note it if the block is left by an error or Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt:
        say("\nit goes on, and nobody will undo it; watch it with `manta apps`")
        _end(cluster, versions, say, "left", "interrupted", "nobody watched it any more")
        raise
    except MantaError as error:
        _end(cluster, versions, say, "failed", _brief(error))  # if it has no other end by now
        raise


def _end(
    cluster: ClusterRecord,
    versions: Sequence[Version],
    say: Say,
    state: history.State,
    why: str = "",
    then: str = "",
) -> None:
    for version in versions:
        try:
            history.end(cluster, version, state, why, then)
        except MantaError as error:  # the change itself is done; do not call it failed
            say(f"version {version.number} of `{version.app}` stays without its end: {error.what}")


def _warn_of_secrets(apps: Mapping[str, Mapping[str, object]], say: Say) -> None:
    for name, app in apps.items():
        for path, what in secrets.plain(app):
            where = ".".join(map(str, path))
            say(f"`{name}`: {what} stands in plain text at {where}; history does not keep it")
