"""A small application for a node that is drained: two replicas, answers after `s` seconds."""

from __future__ import annotations

import asyncio
from typing import Any

from ray import serve


@serve.deployment(num_replicas=2, max_ongoing_requests=100, ray_actor_options={"num_cpus": 0.5})
class Drained:
    async def __call__(self, request: Any) -> str:
        await asyncio.sleep(float(request.query_params.get("s", "0")))
        return "answered"


app = Drained.bind()
