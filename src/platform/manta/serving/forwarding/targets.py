"""Who answers for the gateway's models: address, key and breaker of each, in one replica."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from manta.cluster import record
from manta.errors import InputError
from manta.serving.access import owner
from manta.serving.forwarding.breaker import Breaker
from manta.spec.gateway import BreakerConfig, GatewayModel, Target, WeightedTarget

LOOK_S = 2.0
"""Between looks at where applications answer."""
KEY_S = 5.0
"""After which a key's file is read again."""


class Applications:
    """Where the applications of one cluster answer, as Serve's own proxy says."""

    def __init__(self, find_root: Callable[[], str]) -> None:
        """
        Args:
            find_root: tells the proxy's base URL; called once, in a thread.
        """
        self._find_root = find_root
        self._root_url = ""
        self._prefixes: dict[str, str] = {}

    async def look(self) -> None:
        """Ask once. What was known stays if nobody answers."""
        if not self._root_url:
            self._root_url = (await asyncio.to_thread(self._find_root)).rstrip("/")
        timeout = aiohttp.ClientTimeout(total=LOOK_S)
        try:
            async with (
                aiohttp.ClientSession(timeout=timeout) as session,
                session.get(f"{self._root_url}/-/routes") as answer,
            ):
                if answer.status == 200:
                    routes: dict[str, str] = await answer.json(content_type=None)
                    self._prefixes = {app: prefix for prefix, app in routes.items()}
        except (aiohttp.ClientError, TimeoutError, ValueError):
            return

    def base(self, app: str) -> str | None:
        """Its URL without a slash at the end; None if it is not there."""
        prefix = self._prefixes.get(app)
        return None if prefix is None else self._root_url + prefix.rstrip("/")


def elsewhere(cluster: str) -> Applications:
    """Those of another cluster. Raises InputError if this node does not know it."""
    found = record.load(cluster)
    return Applications(lambda: found.serve_url)


class Secret:
    """A key from a file, which may be replaced while this runs, or from a variable."""

    def __init__(self, target: Target) -> None:
        self._path = _path(target)
        self._read_at = 0.0
        self._value: str | None = None
        if self._path:
            self._value = owner.read_secret(self._path)
        elif target.api_key_env:
            self._value = os.environ.get(target.api_key_env)
            if not self._value:
                fix = "set it where the cluster is started, or in the application's runtime_env"
                raise InputError(f"${target.api_key_env} is not set", fix)

    def value(self) -> str | None:
        """The key; None for an open endpoint."""
        now = time.monotonic()
        if self._path and now - self._read_at > KEY_S:
            self._read_at = now
            try:
                self._value = owner.read_secret(self._path)
            except InputError:  # being replaced, or gone: the one before is as good as none
                return self._value
        return self._value


def _path(target: Target) -> Path | None:
    if target.api_key_file:
        return Path(target.api_key_file).expanduser()
    if target.url or target.api_key_env:
        return None
    return owner.key_file(target.cluster)


@dataclass(eq=False)
class Upstream:
    """A target as one replica knows it."""

    target: Target
    model: str
    """What the model is called there."""
    secret: Secret
    breaker: Breaker
    weight: float = 1.0

    @property
    def label(self) -> str:
        """What answers and metrics call it."""
        return self.target.label

    def url(self, path: str, applications: Applications | None) -> str | None:
        """Where it answers for a route such as `/v1/chat/completions`; None if nowhere."""
        if self.target.app:
            base = applications.base(self.target.app) if applications else None
            return None if base is None else base + path
        assert self.target.url is not None
        if path.startswith("/v1/"):
            return self.target.url + path.removeprefix("/v1")
        root, version, rest = self.target.url.rpartition("/v1")
        return root + path if version and not rest else None


@dataclass(frozen=True, kw_only=True)
class Served:
    """A model of the gateway with its targets."""

    name: str
    shared: tuple[Upstream, ...]
    fallback: tuple[Upstream, ...]
    draw: Callable[[], float] = field(default=random.random)

    @property
    def all(self) -> tuple[Upstream, ...]:
        """Every target."""
        return (*self.shared, *self.fallback)

    def in_order(self) -> list[Upstream]:
        """Every target once: those that share by weight, drawn anew each time, then fall-back.

        Source: Efraimidis and Spirakis, "Weighted random sampling with a reservoir", 2006.
        """
        drawn = sorted(self.shared, key=lambda one: self.draw() ** (1 / one.weight), reverse=True)
        return [*drawn, *self.fallback]


def served(name: str, model: GatewayModel, breaker: BreakerConfig) -> Served:
    """A model's targets. Raises InputError if a key that is named is not there."""

    def upstream(target: Target) -> Upstream:
        return Upstream(
            target=target,
            model=target.model or name,
            secret=Secret(target),
            breaker=Breaker(breaker),
            weight=target.weight if isinstance(target, WeightedTarget) else 1.0,
        )

    return Served(
        name=name,
        shared=tuple(map(upstream, model.to)),
        fallback=tuple(map(upstream, model.fallback)),
    )
