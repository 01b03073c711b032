"""Takes out of the direct way to an engine what Ray puts there and nobody needs.

With direct streaming HAProxy asks an `LLMRouter` replica before each request which engine shall
have it, and a starting engine waits for an actor that collects usage statistics. The first costs
milliseconds and is one more process that can die; the second costs the seconds of a start, also
where statistics are off. Ray has switches for neither; the names are of Ray 2.60, and
tests/integration/test_llm_builder.py fails where they change.
"""

from __future__ import annotations

import os
from typing import Any

from ray.serve import Application
from ray.serve.config import RequestRouterConfig
from ray.serve.llm import LLMServer


class Untold:
    """Mixed in: the engine starts, and no statistics are gathered that are never sent."""

    async def _start_engine(self) -> None:
        await self.engine.start()  # type: ignore[attr-defined]


def untold(base: type) -> type:
    """`base` without the actor for statistics, if those are off and it starts as Ray's own."""
    theirs = getattr(base, "_start_engine", None) is not LLMServer._start_engine
    if theirs or os.environ.get("RAY_USAGE_STATS_ENABLED") != "0":
        return base
    return type(base.__name__, (Untold, base), {"__qualname__": base.__qualname__})


def chosen_by_haproxy(app: Application, llm_config: dict[str, Any]) -> Application:
    """`app` with HAProxy's own choice of a replica: the one with the fewest connections.

    A router stays where the config names one: it knows prefixes, or what an engine has cached.
    """
    if "request_router_config" in (llm_config.get("deployment_config") or {}):
        return app
    app._ingress_request_router = None
    app._bound_deployment = app._bound_deployment.options(
        request_router_config=RequestRouterConfig(), _internal=True
    )
    return app
