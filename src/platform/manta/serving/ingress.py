"""Puts the guard in front of whatever class answers HTTP in a Ray Serve application."""

from __future__ import annotations

import uuid
from typing import Any

from manta.serving.guard import Guard
from manta.serving.key_store import KeyTable
from manta.serving.limiter import SharedLimiter
from manta.serving.metrics import Ray
from manta.serving.observer import Observer
from manta.serving.splitter import Splitter
from manta.serving.tracing import tracer
from manta.serving.usage import Ledger
from manta.serving.vitals import VitalsWriter
from manta.spec.guard import GuardConfig


class Guarded:
    """Mixed in: what Ray takes for the class's ASGI application is its guard.

    Ray calls `_set_asgi_app` once, with the application that it or vLLM made. Should a Ray of
    another version not do so, the health check fails and the replica never gets a request.
    """

    guard_config: GuardConfig
    guard_root: str

    def _set_asgi_app(self, app: Any) -> None:
        config, root = self.guard_config, self.guard_root
        replica_id, application = _replica()
        limiter = SharedLimiter(uuid.uuid4().hex, root)
        vitals = VitalsWriter(root, replica_id) if replica_id else None
        observer = Observer(Ray(), tracer(config.tracing, application))
        ledger = Ledger(root, config.prices)
        split = (
            Splitter(root, replica_id, application, config.request_timeout_s)
            if replica_id
            else None
        )
        guard = Guard(app, config, KeyTable(root), limiter, ledger, vitals, observer, split)
        super()._set_asgi_app(guard)  # type: ignore[misc]

    async def check_health(self) -> None:
        """Raise if the application stands without its guard."""
        if not isinstance(getattr(self, "app", None), Guard):
            raise RuntimeError("the guard is not in front of the application")
        if own := getattr(super(), "check_health", None):
            await own()


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


def guarded_class(base: type, config: GuardConfig, root: str) -> type:
    """`base` with its guard, under its own name: Ray finds routes and deployments by that."""
    made = type(base.__name__, (Guarded, base), {"guard_config": config, "guard_root": root})
    made.__qualname__ = base.__qualname__
    return made
