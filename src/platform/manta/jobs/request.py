"""From a plan to a complete request: the code is put into storage, and who asks is noted."""

from __future__ import annotations

import getpass
import socket
from pathlib import Path

import manta
from manta import storage
from manta.cluster import record
from manta.cluster.record import ClusterRecord
from manta.errors import InputError, MantaError
from manta.jobs import fits, own_budget, packages, queries, reports, shape
from manta.jobs.model import PRIORITIES, JobRequest, check_id
from manta.plan.demand import Demand
from manta.plan.jobs import JobPlan
from manta.spec import JobSpec
from manta.state import State


def me() -> str:
    """The user's login name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"


def actor() -> str:
    """Who acts, for the record of events: user@host."""
    return f"{me()}@{socket.gethostname()}"


def placed(spec: JobSpec, plan: JobPlan) -> JobSpec:
    """The job with its clusters in the order in which it takes them."""
    if spec.prefer == "order" or not spec.clusters:
        return spec
    clusters = own_budget.cheapest_first(spec.clusters, plan.demand)
    return spec.model_copy(update={"clusters": clusters})


def prepare(
    plan: JobPlan, spec: JobSpec | None, *, cluster: str, storage_url: str, working_dir: Path
) -> JobRequest:
    """Make the request complete: ships the local folders of its runtime_env to storage.

    Args:
        plan: what to run.
        spec: the job file, for how it queues; None for a step of a pipeline.
        cluster: where.
        storage_url: root under which code and log are kept.
        working_dir: whose git commit is noted.

    Raises:
        InputError: its id cannot be one, its runtime_env cannot be used, or the cluster, or what
            it can be scaled to, could never hold it, or it costs more than its budget.
        MantaError: the storage cannot be written.
    """
    check_id(plan.submission_id)
    require_possible(plan.demand, cluster)
    budget_usd, others = (spec.budget_usd, spec.clusters) if spec else (None, ())
    own_budget.require_enough(budget_usd, plan.timeout_s, plan.demand, {cluster, *others})
    shipped = packages.ship(plan.runtime_env_passthrough, storage_url)
    report_url = reports.place(storage_url, plan.submission_id)
    return JobRequest(
        id=plan.submission_id,
        name=spec.name if spec else plan.submission_id,
        entrypoint=plan.entrypoint,
        runtime_env_passthrough=reports.with_place(shipped.runtime_env_passthrough, report_url),
        packages=shipped.packages,
        resources=plan.resources,
        metadata=dict(plan.metadata),
        retry=plan.retry,
        timeout_s=plan.timeout_s,
        deadline_s=spec.deadline_s if spec else None,
        budget_usd=budget_usd,
        priority=PRIORITIES[spec.priority if spec else "normal"],
        team=spec.team if spec else "default",
        user=me(),
        cluster=cluster,
        clusters=spec.clusters if spec else (),
        spill_after_s=spec.spill_after_s if spec else 0.0,
        shape=shape.of_demand(plan.demand),
        storage_url=storage_url,
        code_version=packages.code_version(working_dir),
        manta_version=manta.__version__,
    )


def require_possible(demand: Demand, cluster: str) -> None:
    """Refuse what the cluster could never hold; one that does not answer is not asked."""
    known = next((found for found in record.load_all() if found.name == cluster), None)
    if known is None or not demand:
        return
    try:
        fits.require_possible(known, demand)
    except InputError:
        raise
    except MantaError:
        return


def storage_of(state: State, cluster: str) -> str:
    """The storage root of a cluster that is up, or was seen by a controller.

    Raises InputError if nobody has ever seen it: a misspelt name must not wait for ever.
    """
    known: dict[str, ClusterRecord] = {found.name: found for found in record.load_all()}
    if cluster in known:
        return known[cluster].storage_url
    for seen in queries.clusters_seen(state):
        if seen["name"] == cluster:
            return str(seen["storage_url"]) or storage.root()
    record.find(cluster)  # raises, with the names that there are
    raise AssertionError(f"{cluster} is on record after all")
