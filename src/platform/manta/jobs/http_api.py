"""The queue over HTTP, with an OpenAPI document: for programs that are not Python.

Every request needs a key, on loopback too: other users of the machine reach that as well. Errors
are those of the commands, in the same words, as `{"error": …, "fix": …}`.
"""
# No `from __future__ import annotations`: FastAPI reads the annotations, and those here name
# dependencies that exist only inside a function.

import socket
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import Field

import manta
from manta.errors import InputError, MantaError
from manta.jobs import (
    access,
    http_costs,
    http_metrics,
    http_overview,
    logs,
    own_budget,
    passes,
    queries,
    reports,
    request,
    shares,
    store,
    web_page,
)
from manta.jobs.access import Key, Role
from manta.jobs.books import Share
from manta.jobs.http_body import Body
from manta.jobs.model import PRIORITIES, IdTaken, Job, JobRequest, JobState, UnknownJob
from manta.jobs.shape import of_resources
from manta.plan.demand import demand_of_work
from manta.spec import Resources, Retry, Work
from manta.spec.data import Name
from manta.state import State, StateError

MAX_PAGE = 10_000
MAX_LOG_BYTES = 2**20
LOG_OFFSET = "X-Log-Offset"
_Limit = Annotated[int, Query(ge=1, le=MAX_PAGE)]
_Seq = Annotated[int, Query(ge=0, le=2**62)]
_Before = Annotated[int | None, Query(ge=0, le=2**62)]
_Name = Annotated[str | None, Query(max_length=200)]


class Submission(Body):
    """What a job is, without local files: its code is a URI in `runtime_env`, or on the nodes."""

    id: str = Field(max_length=128)
    name: Name = "job"
    entrypoint: str = Field(min_length=1, max_length=100_000)
    runtime_env: dict[str, Any] = Field(default_factory=dict)
    resources: Resources = Resources()
    retry: Retry = Retry()
    priority: Literal["low", "normal", "high"] = "normal"
    team: Name = "default"
    cluster: str = Field("local", max_length=40)
    timeout_s: float | None = Field(None, gt=0, le=1e9)
    deadline_s: float | None = Field(None, gt=0, le=1e9)
    budget_usd: float | None = Field(None, gt=0, le=1e12)


class Quota(Body):
    """What a team or user is due, and may hold at most; `slot` limits the number of jobs."""

    weight: float = Field(1.0, gt=0, le=1e9)
    limits: dict[str, Annotated[float, Field(ge=0, le=1e12)]] = Field(
        default_factory=dict, max_length=100
    )


class Forbidden(MantaError):
    """The key may not do this."""


class NoKey(MantaError):
    """There is no key, or it is none of ours."""


STATUS: dict[type[MantaError], int] = {
    NoKey: 401,
    Forbidden: 403,
    UnknownJob: 404,
    IdTaken: 409,
    store.Conflict: 409,
    InputError: 400,
    StateError: 503,
}


def app(state: State) -> FastAPI:
    """The application; serves `state`."""
    api = FastAPI(title="Manta queue", version=manta.__version__, docs_url=None, redoc_url=None)
    api.add_exception_handler(MantaError, _explain)
    api.add_exception_handler(RequestValidationError, _explain_validation)
    _add_reading(api, state)
    _add_acting(api, state)
    http_costs.add(api, state, _guard(state, Role.VIEWER), _guard(state, Role.ADMIN))
    http_overview.add(api, state, [Depends(_guard(state, Role.VIEWER))])
    http_metrics.add(api, state, [Depends(_guard(state, Role.VIEWER))])
    web_page.add(api)
    return api


def _guard(state: State, role: Role) -> Callable[..., Key]:
    """A dependency that gives the caller's key, if it has that role."""
    scheme = HTTPBearer(auto_error=False)

    def check(
        credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(scheme)],
    ) -> Key:
        key = access.find(state, credentials.credentials) if credentials else None
        if key is None:
            raise NoKey("no valid key", "send `Authorization: Bearer KEY`; see `manta access`")
        if key.role < role:
            raise Forbidden(f"key {key.name} is a {key.role.name.lower()}", f"needs {role.name}")
        return key

    return check


def _add_reading(api: FastAPI, state: State) -> None:
    viewer = [Depends(_guard(state, Role.VIEWER))]

    @api.get("/healthz")
    def health() -> dict[str, Any]:
        """Whether the state answers; needs no key and tells nothing else."""
        queries.counts(state)
        return {"status": "ok"}

    @api.get("/api/v1/jobs", dependencies=viewer)
    def jobs(
        states: Annotated[list[JobState] | None, Query()] = None,
        user: _Name = None,
        team: _Name = None,
        cluster: _Name = None,
        after_seq: _Seq = 0,
        before_seq: _Before = None,
        limit: _Limit = 1000,
    ) -> list[dict[str, Any]]:
        """The newest jobs, or the newest before job `before_seq`; oldest of them first."""
        found = queries.listed(
            state,
            states=states or (),
            user=user,
            team=team,
            cluster=cluster,
            after_seq=after_seq,
            before_seq=before_seq,
            limit=limit,
        )
        return [asdict(job) for job in found]

    @api.get("/api/v1/jobs/{job_id}", dependencies=viewer)
    def job(job_id: str) -> dict[str, Any]:
        """One job with its attempts."""
        found = asdict(queries.get(state, job_id))
        return found | {"attempts": [asdict(a) for a in queries.attempts_of(state, job_id)]}

    @api.get("/api/v1/jobs/{job_id}/why", dependencies=viewer)
    def why(job_id: str) -> dict[str, str]:
        """What the job waits for."""
        found = queries.get(state, job_id)
        waits = found.state is JobState.QUEUED
        reason = passes.explain(state, found) if waits else found.message
        return {"state": found.state, "why": reason}

    @api.get("/api/v1/jobs/{job_id}/log", dependencies=viewer, response_class=PlainTextResponse)
    def log(
        job_id: str, attempt: _Seq = 0, offset: _Seq = 0, tail: _Before = None
    ) -> PlainTextResponse:
        """The log from byte `offset` on, a megabyte at most; of the newest attempt if 0.

        With `tail` no more than the last so many bytes; X-Log-Offset says where they begin.
        """
        found = queries.get(state, job_id)
        url = logs.folder(found.storage_url, found.id, attempt or found.attempt)
        if tail is not None:
            offset = max(offset, logs.size(url) - min(tail, MAX_LOG_BYTES))
        data = b""
        for piece in logs.read(url, offset):
            data += piece
            if len(data) >= MAX_LOG_BYTES:
                break
        return PlainTextResponse(data[:MAX_LOG_BYTES], headers={LOG_OFFSET: str(offset)})

    @api.get("/api/v1/events", dependencies=viewer)
    def events(
        job_id: _Name = None, after_seq: _Seq = 0, limit: _Limit = 1000
    ) -> list[dict[str, Any]]:
        """What happened since event `after_seq`; the newest so many."""
        found = queries.events_of(state, job_id=job_id, after_seq=after_seq, limit=limit)
        return [asdict(event) for event in found]

    @api.get("/api/v1/quotas", dependencies=viewer)
    def quotas() -> dict[str, Any]:
        """Weights and limits of teams and users."""
        return asdict(shares.load(state))


def _add_acting(api: FastAPI, state: State) -> None:
    submitter, admin = _guard(state, Role.SUBMITTER), _guard(state, Role.ADMIN)

    @api.post("/api/v1/jobs")
    def submit(
        job: Submission, key: Annotated[Key, Depends(submitter)], asked: Request
    ) -> dict[str, Any]:
        """Accept a job. The same id and content again is the same job, sent as often as may be."""
        accepted, new = store.submit(state, _request(state, job, key), _actor(key, asked))
        return {"new": new, "job": asdict(accepted)}

    @api.post("/api/v1/jobs/{job_id}/stop")
    def stop(
        job_id: str, key: Annotated[Key, Depends(submitter)], asked: Request
    ) -> dict[str, Any]:
        """Ask for the job's end; again changes nothing."""
        _require_own(queries.get(state, job_id), key)
        return asdict(store.ask_stop(state, job_id, _actor(key, asked), f"stopped by {key.name}"))

    @api.post("/api/v1/jobs/{job_id}/retry")
    def retry(
        job_id: str, key: Annotated[Key, Depends(submitter)], asked: Request
    ) -> dict[str, Any]:
        """Put a job that failed back into the queue."""
        _require_own(queries.get(state, job_id), key)
        return asdict(store.retry(state, job_id, _actor(key, asked)))

    @api.put("/api/v1/quotas/{kind}/{name}")
    def set_quota(
        kind: Literal["team", "user"],
        name: str,
        quota: Quota,
        key: Annotated[Key, Depends(admin)],
        asked: Request,
    ) -> dict[str, Any]:
        """Set the share of a team or user."""
        share = Share(weight=quota.weight, limits=quota.limits)
        shares.put(state, kind, name, share, _actor(key, asked))
        return asdict(share)


def _request(state: State, job: Submission, key: Key) -> JobRequest:
    for field in ("working_dir", "py_modules"):
        value = job.runtime_env.get(field)
        for path in value if isinstance(value, list) else [value] if value else []:
            if not isinstance(path, str) or "://" not in path:
                raise InputError(f"runtime_env.{field} names a local path", "give a URI")
    demand = demand_of_work(Work(resources=job.resources), "", Path(), "")
    request.require_possible(demand, job.cluster)
    own_budget.require_enough(job.budget_usd, job.timeout_s, demand, {job.cluster})
    storage_url = request.storage_of(state, job.cluster)
    runtime_env = reports.with_place(job.runtime_env, reports.place(storage_url, job.id))
    return JobRequest(
        id=job.id,
        name=job.name,
        entrypoint=job.entrypoint,
        runtime_env_passthrough=runtime_env,
        resources=job.resources,
        retry=job.retry,
        timeout_s=job.timeout_s,
        deadline_s=job.deadline_s,
        budget_usd=job.budget_usd,
        priority=PRIORITIES[job.priority],
        user=key.name,
        team=job.team,
        cluster=job.cluster,
        shape=of_resources(job.resources),
        storage_url=storage_url,
        manta_version=manta.__version__,
    )


def _require_own(job: Job, key: Key) -> None:
    if key.role < Role.ADMIN and job.user != key.name:
        raise Forbidden(f"job {job.id} is {job.user}'s", "needs ADMIN")


def _actor(key: Key, request: Request) -> str:
    """Who, and from where: the address that the server sees, a proxy's if there is one."""
    return f"key:{key.name}@{request.client.host if request.client else 'unknown'}"


async def _explain(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, MantaError)
    kinds = [kind for kind in type(error).__mro__ if kind in STATUS]
    status = STATUS[kinds[0]] if kinds else 500
    return JSONResponse({"error": error.what, "fix": error.fix}, status)


async def _explain_validation(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    faults = error.errors()
    fault = faults[0] if faults else {"loc": (), "msg": "not valid"}
    where = ".".join(str(part) for part in fault["loc"])
    return JSONResponse({"error": f"{where}: {fault['msg']}"[:500], "fix": ""}, 422)


def serve(state: State, host: str, port: int) -> None:
    """Serve in a thread that ends with the process. Raises InputError if the address is taken."""
    import uvicorn

    try:
        listener = socket.create_server((host, port))
    except OSError as error:
        raise InputError(f"cannot listen on {host}:{port} ({error.strerror})") from None
    server = uvicorn.Server(uvicorn.Config(app(state), log_level="warning", access_log=False))
    threading.Thread(target=server.run, args=([listener],), name="http", daemon=True).start()
