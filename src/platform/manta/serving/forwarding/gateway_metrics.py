"""What comes of the gateway's requests at each target, and what it tells of that."""

from __future__ import annotations

from enum import StrEnum

from manta.serving.forwarding.forward import Head
from manta.serving.telemetry.metrics import Metric


class Outcome(StrEnum):
    """Of one try at one target."""

    OK = "ok"
    REFUSED = "refused"
    """It told the client what is wrong with the request."""
    UNREACHABLE = "unreachable"
    SILENT = "silent"
    """No first byte in time."""
    BROKEN = "broken"
    """Head and nothing more."""
    DOWN = "down"
    """It, or what stands before it, says that nobody is there."""
    CLOSED = "closed"
    """It does not take the gateway's key, or sends it elsewhere."""
    FAILED = "failed"
    """An error of its own with this request."""
    ABSENT = "absent"
    """It has no such route or model."""
    OVERLOADED = "overloaded"
    LEFT_OUT = "left_out"
    CUT = "cut"
    """The answer broke off after its beginning was sent."""
    CLIENT_GONE = "client_gone"


REQUESTS = Metric(
    name="manta_gateway_requests",
    kind="counter",
    description="Requests that the gateway has given to a target, by what came of them",
    labels=("model", "target", "outcome"),
)
LEFT_OUT = Metric(
    name="manta_gateway_target_left_out",
    kind="gauge",
    description="1 while a target is left out because it did not answer",
    labels=("model", "target"),
)
ALL = (REQUESTS, LEFT_OUT)
"""Every metric of a gateway."""


def outcome_of(head: Head) -> Outcome | None:
    """Why an answer that begins so is not for the client; None if it is.

    Serve's proxies say 500 in plain text where no replica is, and 404 in plain text where no
    route is; an application that is there answers in JSON.
    """
    status = head.status
    is_json = head.get(b"content-type").startswith(b"application/json")
    if status == 429 or (status == 503 and head.get(b"retry-after")):
        return Outcome.OVERLOADED
    if status in (401, 403) or 300 <= status < 400:
        return Outcome.CLOSED
    if status in (404, 405):
        return Outcome.ABSENT if is_json else Outcome.DOWN
    if status == 500 and is_json:
        return Outcome.FAILED
    return Outcome.DOWN if status >= 500 else None
