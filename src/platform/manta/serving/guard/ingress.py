"""Puts the guard in front of whatever class answers HTTP in a Ray Serve application."""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

from manta.serving.access.key_store import KeyTable
from manta.serving.access.usage import Ledger
from manta.serving.canary.splitter import Splitter
from manta.serving.guard.guard import App, Guard
from manta.serving.guard.limiter import SharedLimiter
from manta.serving.telemetry.metrics import Ray
from manta.serving.telemetry.observer import Observer
from manta.serving.telemetry.tracing import tracer
from manta.serving.telemetry.vitals import VitalsWriter
from manta.spec.guard import GuardConfig

ENGINE_POLL_S = 0.25

logger = logging.getLogger(__name__)


class Guarded:
    """Mixed in: what Ray takes for the class's ASGI application is its guard.

    Ray calls `_set_asgi_app` once, with the application that it or vLLM made. Should a Ray of
    another version not do so, the health check fails and the replica never gets a request.
    """

    guard_config: GuardConfig
    guard_root: str
    guard_inside: Callable[[App, str], App] | None
    """Makes, of the application and the storage root, what stands right behind the guard."""

    def _set_asgi_app(self, app: Any) -> None:
        config, root = self.guard_config, self.guard_root
        replica_id, application = _replica()
        if inside := type(self).guard_inside:
            app = inside(app, root)
        limiter = SharedLimiter(uuid.uuid4().hex, root)
        vitals = VitalsWriter(root, replica_id) if replica_id else None
        observer = Observer(Ray(), tracer(config.tracing, application))
        ledger = Ledger(root, config.prices)
        split = (
            Splitter(root, replica_id, application, config.request_timeout_s)
            if replica_id
            else None
        )
        guard = Guard(
            app,
            config,
            KeyTable(root),
            limiter,
            ledger,
            vitals=vitals,
            observer=observer,
            split=split,
            application=application,
            num_sequences=_num_sequences(self),
        )
        super()._set_asgi_app(guard)  # type: ignore[misc]
        if replica_id:
            threading.Thread(target=self._end_with_engine, daemon=True).start()

    def _end_with_engine(self) -> None:
        """End the replica when vLLM's engine process has died, as vLLM's own server does.

        It would fail each request at once, so that a balancer that looks for the least busy
        sends it nearly all; Serve would see that after three looks, 20 to 30 s.
        """
        while not getattr(_engine_client(self), "errored", False):
            time.sleep(ENGINE_POLL_S)
        logger.error("the engine has died, and this replica with it; Serve starts another")
        time.sleep(ENGINE_POLL_S)  # for the errors of what it was answering to go out
        os._exit(1)

    async def check_health(self) -> None:
        """Raise if the application has no guard, or is far slower than its other replicas."""
        guard = getattr(self, "app", None)
        if not isinstance(guard, Guard):
            raise RuntimeError("the guard is not in front of the application")
        if guard.judge.is_slow:
            raise RuntimeError("far slower than the other replicas; it is to be replaced")
        if own := getattr(super(), "check_health", None):
            await own()


def _engine_client(server: object) -> object:
    """vLLM's client of its engine process; None before it runs, and in other applications."""
    return getattr(getattr(server, "engine", None), "_engine_client", None)


def _num_sequences(server: object) -> int | None:
    """How many sequences vLLM's engine runs at once; None before it runs, and without one."""
    config = getattr(_engine_client(server), "vllm_config", None)
    return None if config is None else int(config.scheduler_config.max_num_seqs)


def _replica() -> tuple[str | None, str]:
    """Serve's id of the replica that this process is, and its application's name.

    Outside of Serve None and `manta`.
    """
    from ray import serve
    from ray.serve.exceptions import RayServeException

    try:
        context = serve.get_replica_context()
    except RayServeException:
        return None, "manta"
    return str(context.replica_tag), str(context.app_name)


def guarded_class(
    base: type,
    config: GuardConfig,
    root: str,
    inside: Callable[[App, str], App] | None = None,
) -> type:
    """`base` with its guard, under its own name: Ray finds routes and deployments by that."""
    settings = {"guard_config": config, "guard_root": root, "guard_inside": inside}
    made = type(base.__name__, (Guarded, base), settings)
    made.__qualname__ = base.__qualname__
    return made
