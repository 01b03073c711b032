"""The controller: looks at state and clusters, decides by pure functions, acts in one place.

What it holds in memory it can lose: killed at any moment, its successor reads the state, looks at
the clusters, and goes on. Two orders make that so. An attempt is written down before Ray is asked
for it, and Ray takes a submission id only once. A log is read to its end before the attempt's end
is written.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from manta.cluster import record
from manta.cluster.record import ClusterRecord
from manta.jobs import handover, leftovers, logs, passes, policy, queries, shares, store
from manta.jobs.accounts import Accounts
from manta.jobs.books import MAX_RUNNING, Room, Shares
from manta.jobs.cron import Clock
from manta.jobs.lease import RENEW_S, Lease, LeaseLost
from manta.jobs.model import Attempt, Cause, Job, JobState
from manta.jobs.policy import Outcome
from manta.jobs.ray_api import RayJob
from manta.jobs.shipper import Shipper
from manta.jobs.steady import Steady
from manta.jobs.view import View
from manta.jobs.walk import Deploy, Walker
from manta.jobs.watch import Sight, Watch
from manta.state import State, StateError, now

TICK_S = 0.25
IDLE_TICK_S = 1.0
YOUNG_S = 60.0
"""So long after its start a job is looked at more often: each look costs the head some CPU."""
STOP_AGAIN_S = 5.0
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a controller runs."""

    idle_stop_s: float | None = None
    """Seconds without an unfinished job after which it ends; None: never."""
    max_running: int = MAX_RUNNING
    preempt: bool = False
    """Whether jobs of a lower priority are stopped and requeued for those of a higher."""
    file: Path | None = None
    """The state's file; when it is gone there is nothing to work on."""
    deploy: Deploy | None = None
    """How steps of pipelines deploy; None: they cannot."""


class Controller:
    """One controller's life, from having the lease until it is told to stop or loses it."""

    def __init__(self, state: State, lease: Lease, options: Options) -> None:
        self._state, self._lease, self._options = state, lease, options
        self._wake, self._stop = threading.Event(), threading.Event()
        self._pool = ThreadPoolExecutor(max_workers=12, thread_name_prefix="cluster")
        self._watch = Watch(self._pool, self._wake.set)
        self._accounts = Accounts(state, lease, self._pool, options.max_running)
        self._view, self._clock = View(state), Clock(state, lease)
        self._walker = Walker(state, lease, self._wake.set, options.deploy)
        self._shipper, self._steady = Shipper(), Steady()
        self._flights: dict[str, Future[Outcome | None]] = {}
        self._landed_at: dict[str, float] = {}
        self._stop_sent_at: dict[str, float] = {}
        self._pending_at: dict[str, float] = {}
        self._known: set[str] = set()
        self._told: dict[str, object] = {}
        self._shares = Shares()
        self._busy_at = time.monotonic()
        self._sights: dict[str, Sight] = {}

    def stop(self) -> None:
        """End soon; running jobs go on."""
        self._stop.set()
        self._wake.set()

    def run(self) -> None:
        """Work until `stop`, idleness or the loss of the lease, which raises LeaseLost."""
        self._shipper.start()
        renewer = threading.Thread(target=self._keep_lease, name="lease", daemon=True)
        renewer.start()
        try:
            while not self._stop.is_set() and not self._idle_too_long():
                self._guarded_tick()
                self._wait()
        finally:
            self._stop.set()
            self._shipper.close()
            self._walker.close()
            self._pool.shutdown(wait=False, cancel_futures=True)
        with self._state.read() as connection:
            self._lease.check(connection)

    def _keep_lease(self) -> None:
        while not self._stop.wait(RENEW_S):
            if self._options.file is not None and not self._options.file.exists():
                log.error("%s is gone", self._options.file)  # SQLite itself would not notice
                self.stop()
                break
            try:
                self._lease.renew(self._state)
            except LeaseLost as error:
                log.error("%s", error)
                self.stop()
            except StateError as error:
                log.warning("%s", error)  # tried again; at worst another takes over

    def _guarded_tick(self) -> None:
        try:
            self._tick()
        except store.Conflict as error:
            log.info("%s", error)  # decided on what was old: look again
        except StateError as error:
            log.warning("%s", error)
            self._stop.wait(1.0)

    def _wait(self) -> None:
        deadline = time.monotonic() + (TICK_S if self._view.active else IDLE_TICK_S)
        try:
            mark = self._state.change_mark()
            while time.monotonic() < deadline and not self._wake.wait(self._state.listen_s):
                if self._state.change_mark() != mark:
                    break
        except StateError as error:
            log.warning("%s", error)
            self._stop.wait(1.0)
        self._wake.clear()

    def _idle_too_long(self) -> bool:
        view, runs = self._view, self._walker.unfinished
        if view.active or view.waiting or self._clock.entries or runs:
            self._busy_at = time.monotonic()
        limit_s = self._options.idle_stop_s
        return limit_s is not None and time.monotonic() > self._busy_at + limit_s

    def _tick(self) -> None:
        self._view.refresh()
        self._clock.tick(now(), changed=self._view.changed)
        self._walker.tick(changed=self._view.changed)
        if self._view.changed:
            self._shares = shares.load(self._state)
        busy = {
            self._view.attempt(job).cluster for job in self._view.active.values() if _young(job)
        }
        names = {known.name for known in record.load_all()}
        names |= {self._view.attempt(job).cluster for job in self._view.active.values()}
        names |= self._view.waiting.clusters()
        self._sights = self._watch.look(names, busy)
        for job in list(self._view.active.values()):
            self._guarded_attend(job)
        for sight in self._sights.values():
            self._remember(sight)
        self._accounts.tick(self._sights)
        self._admit()
        ours = {self._view.attempt(job).submission_id for job in self._view.active.values()}
        for sight in self._sights.values():
            for seen in sight.jobs.values():
                if seen.submission_id not in ours:
                    self._look_at_other(sight, seen)

    # -- One active job --

    def _guarded_attend(self, job: Job) -> None:
        """Never let one job hold up the others."""
        try:
            self._attend(job, self._view.attempt(job))
        except (store.Conflict, StateError, LeaseLost):
            raise
        except Exception:
            log.exception("job %s", job.id)

    def _attend(self, job: Job, attempt: Attempt) -> None:
        sight = self._sights.get(attempt.cluster)
        if attempt.submission_id in self._flights:
            self._land(job, attempt)
        elif sight is None:
            return  # not looked at yet
        elif sight.is_gone or (sight.record and sight.cluster_id != attempt.cluster_id):
            self._lost(job, attempt, "the cluster that ran it is gone")
        elif sight.answers:
            self._compare(job, attempt, sight, sight.jobs.get(attempt.submission_id))

    def _compare(self, job: Job, attempt: Attempt, sight: Sight, seen: RayJob | None) -> None:
        """Bring what is written down in line with what the cluster shows."""
        assert sight.record is not None
        if seen is None:
            if sight.begun_at < self._landed_at.get(attempt.submission_id, 0.0):
                return  # this look is older than the submission
            if job.state is JobState.STARTING:
                self._hand_over(job, attempt, sight.record)
            else:
                self._lost(job, attempt, "the cluster has forgotten it: its head was replaced")
            return
        if not self._is_ours(job, seen):
            self._end(job, attempt, handover.refused("its id is another job's on the cluster"))
            return
        if seen.status == "PENDING":
            self._pending_at[attempt.submission_id] = now()
        elif job.state is JobState.STARTING:
            job = self._running(job, attempt, seen)
        if seen.status != "PENDING":
            url = logs.folder(job.storage_url, job.id, attempt.number)
            self._shipper.follow(sight.record, seen, url)
        if seen.done:
            if job.stop_reason and sight.record.is_here:
                leftovers.end(attempt.cluster_id, attempt.submission_id, seen.job_id)
            self._end(job, attempt, policy.outcome_of(seen), ended_at=seen.ended_at)
        else:
            self._stop_if_due(job, attempt, sight.record)

    def _is_ours(self, job: Job, seen: RayJob) -> bool:
        return job.origin == "ray" or seen.metadata.get(handover.DIGEST_KEY) == job.digest

    def _running(self, job: Job, attempt: Attempt, seen: RayJob) -> Job:
        # Ray's start is when it took the job, which may have waited for a node since.
        waited_until = self._pending_at.pop(attempt.submission_id, 0.0)
        at = min(now(), max(seen.started_at or now(), waited_until))
        self._steady.forget(attempt.submission_id)
        held = self._state, self._lease
        job = store.mark_running(*held, job, attempt, at=at, node_id=seen.node_id)
        self._view.put(job)
        return job

    def _hand_over(self, job: Job, attempt: Attempt, cluster: ClusterRecord) -> None:
        request = self._view.request(job)
        flight = self._pool.submit(handover.submit, cluster, job.digest, request, attempt)
        flight.add_done_callback(lambda _: self._wake.set())
        self._flights[attempt.submission_id] = flight

    def _land(self, job: Job, attempt: Attempt) -> None:
        flight = self._flights[attempt.submission_id]
        if not flight.done():
            return
        del self._flights[attempt.submission_id]
        self._landed_at[attempt.submission_id] = time.monotonic()
        if (outcome := flight.result()) is not None:
            self._end(job, attempt, outcome)

    def _lost(self, job: Job, attempt: Attempt, message: str) -> None:
        outcome = Outcome(state=JobState.FAILED, cause=Cause.HEAD_GONE, message=message)
        self._end(job, attempt, outcome, lost=True)

    def _stop_if_due(self, job: Job, attempt: Attempt, cluster: ClusterRecord) -> None:
        if not job.stop_reason:
            request = self._view.request(job)
            at, since = self._steady.now(attempt.submission_id), self._steady.since
            begun = attempt.started_at and since(attempt.submission_id, attempt.started_at)
            sent = since(attempt.submission_id, job.submitted_at)
            reason = policy.overdue(request, sent, begun, at)
            reason = reason or self._accounts.stop_reason(job)
            if not reason:
                return
            job = store.ask_stop_now(self._state, self._lease, job, reason)
            self._view.put(job)
        self._send_stop(cluster, attempt.submission_id)

    def _end(
        self,
        job: Job,
        attempt: Attempt,
        outcome: Outcome,
        *,
        ended_at: float | None = None,
        lost: bool = False,
    ) -> None:
        """Write down the attempt's end, once its log has been dealt with."""
        log_state = self._shipper.finish(attempt.submission_id, lost=lost)
        if log_state is None:
            return
        verdict = policy.after(
            self._view.request(job),
            outcome,
            num_failures=job.num_failures,
            stop_reason=job.stop_reason,
            now=now(),
            ran=job.state is JobState.RUNNING,
        )
        ended = store.end_attempt(
            self._state,
            self._lease,
            job,
            attempt,
            outcome,
            verdict,
            ended_at=ended_at or now(),
            log_state=log_state,
        )
        self._view.put(ended)
        self._shipper.forget(attempt.submission_id)
        self._stop_sent_at.pop(attempt.submission_id, None)
        self._landed_at.pop(attempt.submission_id, None)
        self._pending_at.pop(attempt.submission_id, None)
        self._steady.forget(attempt.submission_id)

    # -- The queue --

    def _admit(self) -> None:
        if not self._view.waiting:
            return
        line, active = self._view.waiting, self._view.active.values()
        rooms = {name: self._room(sight) for name, sight in self._sights.items()}
        for job_id, cluster, reason in passes.moves(now(), line, active, rooms):
            job = queries.get(self._state, job_id)
            self._view.put(store.send_to(self._state, self._lease, job, cluster, reason))
        plan = passes.run(now(), line, active, rooms, self._shares, preempt=self._options.preempt)
        for job_id in plan.expired:
            job = queries.get(self._state, job_id)
            reason = f"{Cause.DEADLINE}: it passed while the job waited"
            self._view.put(store.ask_stop_now(self._state, self._lease, job, reason))
        for victim_id, job_id in plan.preempts:
            reason = f"{Cause.PREEMPTED}: to make room for job {job_id}"
            victim = self._view.active[victim_id]
            self._view.put(store.ask_stop_now(self._state, self._lease, victim, reason))
        for job_id in plan.starts:
            self._start(job_id, self._sights[self._view.waiting[job_id].cluster])

    def _room(self, sight: Sight) -> Room:
        return passes.room(sight.name, sight.answers, sight.resources, self._options.max_running)

    def _start(self, job_id: str, sight: Sight) -> None:
        assert sight.record is not None
        job, attempt = store.begin_attempt(
            self._state,
            self._lease,
            queries.get(self._state, job_id),
            cluster=sight.name,
            cluster_id=sight.cluster_id,
        )
        self._view.put(job)
        self._hand_over(job, attempt, sight.record)

    # -- What the clusters are and run besides --

    def _remember(self, sight: Sight) -> None:
        """Write down what a cluster is when it has changed: `--why` answers from it."""
        told = (sight.cluster_id, sight.status, dict(sight.resources))
        was = self._told.get(sight.name)
        if was == told or (sight.record is None and was is None):
            return  # known, or never seen up
        store.see_cluster(
            self._state,
            self._lease,
            sight.name,
            cluster_id=sight.cluster_id,
            storage_url=sight.record.storage_url if sight.record else "",
            status=sight.status,
            resources=json.dumps(self._room(sight).capacity),
            seen_at=now(),
        )
        self._told[sight.name] = told

    def _look_at_other(self, sight: Sight, seen: RayJob) -> None:
        """A submission that is no active attempt: keep it in history, or end it if it is a stray.

        A stray is an attempt of ours that has been given up and runs all the same: its submission
        was under way when its controller died.
        """
        if seen.submission_id in self._known:
            return
        attempt = queries.attempt_named(self._state, seen.submission_id)
        if attempt is None:
            self._adopt(sight, seen)
        elif not seen.done and attempt.state.done and sight.cluster_id == attempt.cluster_id:
            job = queries.get(self._state, attempt.job_id)
            if sight.record and seen.metadata.get(handover.DIGEST_KEY) == job.digest:
                self._send_stop(sight.record, seen.submission_id)
                return  # until it is gone
        self._known.add(seen.submission_id)

    def _adopt(self, sight: Sight, seen: RayJob) -> None:
        assert sight.record is not None
        request = handover.plain_request(sight.record, seen)
        job = store.adopt(
            self._state,
            self._lease,
            request,
            submitted_at=seen.started_at or now(),
            cluster_id=sight.cluster_id,
        )
        if job is not None:
            self._view.put(job)

    def _send_stop(self, cluster: ClusterRecord, submission_id: str) -> None:
        if time.monotonic() > self._stop_sent_at.get(submission_id, 0.0) + STOP_AGAIN_S:
            self._stop_sent_at[submission_id] = time.monotonic()
            self._pool.submit(handover.stop, cluster, submission_id)


def _young(job: Job) -> bool:
    """Whether something may be about to change: it starts, is to stop, or may be short."""
    started_at = job.started_at or now()
    return job.state is JobState.STARTING or bool(job.stop_reason) or now() < started_at + YOUNG_S
