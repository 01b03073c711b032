"""Arguments of the gateway: several models behind one address, and who answers for each."""

from __future__ import annotations

from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from manta.spec.guard import GuardConfig
from manta.spec.loading import Spec


class Target(Spec):
    """Who may answer: an application of this cluster, or an OpenAI-compatible address."""

    app: str | None = Field(None, min_length=1)
    """Name of an application; its route is looked up on its cluster."""
    cluster: str | None = Field(None, pattern=r"^[a-z0-9][a-z0-9-]{0,39}$")
    """Another cluster that has it, as `manta status` on the gateway's node calls it."""
    url: str | None = None
    """Base URL up to and with `/v1`: another cluster's endpoint, or one outside."""
    model: str | None = Field(None, min_length=1)
    """What the model is called there; None: as here."""
    api_key_file: str | None = None
    """Read by each replica on its own node, and again while it runs. Without this and the next an
    application gets the key of its cluster's owner where that lies on the node, an address none.
    """
    api_key_env: str | None = Field(None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    """Name of a variable of the environment that the cluster was started in."""

    @property
    def label(self) -> str:
        """What answers and metrics call it: the application, or the address's host and port."""
        if self.app:
            return f"{self.app}@{self.cluster}" if self.cluster else self.app
        return urlsplit(self.url or "").netloc

    @field_validator("url")
    @classmethod
    def _plain_address(cls, url: str | None) -> str | None:
        if url is None:
            return None
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or not _has_port(url):
            raise ValueError(f"{url!r} is no address; e.g. https://api.example.com/v1")
        if parts.username is not None or parts.query or parts.fragment:
            what = "an address holds no user, password, query or fragment"
            raise ValueError(f"{what}; put a key into `api_key_file`")
        return url.rstrip("/")

    @model_validator(mode="after")
    def _is_one(self) -> Target:
        if (self.app is None) == (self.url is None):
            raise ValueError("a target is either an application or an address; say `app` or `url`")
        if self.cluster and not self.app:
            raise ValueError("`cluster` needs an `app`; say which of its applications")
        if self.api_key_file and self.api_key_env:
            raise ValueError("`api_key_file` stands beside `api_key_env`; keep one")
        return self


def _has_port(url: str) -> bool:
    """Whether the port, if there is one, is a number that a port can have."""
    try:
        return urlsplit(url).port != 0
    except ValueError:
        return False


class WeightedTarget(Target):
    """One that shares a model's requests with others."""

    weight: float = Field(1, gt=0, allow_inf_nan=False)
    """Its part, in relation to the others' weights."""


class GatewayModel(Spec):
    """A name that clients call, and who answers for it."""

    to: tuple[WeightedTarget, ...] = Field(min_length=1)
    """Requests are shared among these; each is tried once before the fall-back."""
    fallback: tuple[Target, ...] = ()
    """Tried one after the other if none of those answers."""

    @property
    def targets(self) -> tuple[Target, ...]:
        """All of them."""
        return (*self.to, *self.fallback)


class BreakerConfig(Spec):
    """When a target is left out because it does not answer."""

    failures: int = Field(3, ge=1)
    """In a row."""
    pause_s: float = Field(10, gt=0)
    """After that one request tries it again; the others go elsewhere until it answers."""


class GatewayArgs(Spec):
    """`args` of `manta.serving.gateway:build_gateway_app`."""

    guard: GuardConfig = GuardConfig()
    models: dict[str, GatewayModel] = Field(min_length=1)
    connect_timeout_s: float = Field(2, gt=0)
    first_byte_timeout_s: float = Field(30, gt=0)
    """Longest time to the first byte of a stream."""
    answer_timeout_s: float = Field(300, gt=0)
    """The same of an answer that comes whole."""
    fall_back_on_overload: bool = True
    """Whether 429, or 503 with `Retry-After`, is a reason to ask the next target."""
    breaker: BreakerConfig = BreakerConfig()
