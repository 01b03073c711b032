"""API keys as values: what is kept of one, who it lets in, and where to.

A secret is 256 random bits, so its plain SHA-256 can be kept: a slow hash (bcrypt, argon2) makes
guessing costly where people choose passwords, and here there is nothing to guess. A presented
secret is hashed and looked up by its hash; how long that takes tells nothing about other
secrets, for nobody can choose a secret whose hash begins as they like it.
"""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import re
import secrets
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from manta.spec.guard import Limits

PREFIX = "manta"
NUM_SECRET_BYTES = 32
SECRET = re.compile(rb"manta_[0-9a-f]{12}_[A-Za-z0-9_-]{43}")
"""What a secret looks like, for those who search logs and repositories for one."""


class Role(StrEnum):
    """What a key is for."""

    USER = "user"
    """Asks models: the routes in `USER_ROUTES`, and no others."""
    VIEWER = "viewer"
    """Reads which models there are, health and metrics."""
    ADMIN = "admin"
    """Every route of the application, also those that a new vLLM brings."""


USER_ROUTES = frozenset(
    {
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/embeddings",
        "/v1/score",
        "/score",
        "/v1/rerank",
        "/v2/rerank",
        "/rerank",
        "/pooling",
        "/classify",
        "/tokenize",
        "/detokenize",
        "/v1/audio/transcriptions",
        "/v1/audio/translations",
    }
)
VIEWER_ROUTES = frozenset({"/health", "/ping", "/version", "/load", "/metrics"})


@dataclass(frozen=True, kw_only=True)
class Key:
    """One API key, without its secret. Never changes; see key_store for how it ends."""

    id: str
    sha256: str
    """Of the secret, in hex."""
    name: str
    owner: str
    role: Role = Role.USER
    models: tuple[str, ...] = ("*",)
    """Patterns of model names, as of a shell."""
    created_at: float
    """UTC seconds, as all times here."""
    expires_at: float | None = None
    limits: Limits = field(default_factory=Limits)

    def may_call(self, method: str, path: str) -> bool:
        """Whether the role reaches this route, whichever model it is about."""
        if self.role is Role.ADMIN:
            return True
        reads = method in ("GET", "HEAD")
        if reads and (path == "/v1/models" or path.startswith("/v1/models/")):
            return True
        if self.role is Role.VIEWER:
            return reads and path in VIEWER_ROUTES
        return method == "POST" and path in USER_ROUTES

    def may_use(self, model: str) -> bool:
        """Whether the key is for this model."""
        return any(fnmatch.fnmatchcase(model, pattern) for pattern in self.models)

    @property
    def for_all_models(self) -> bool:
        """Whether no model is out of reach."""
        return "*" in self.models


def make(
    *,
    name: str,
    owner: str,
    now: float,
    role: Role = Role.USER,
    models: tuple[str, ...] = ("*",),
    expires_at: float | None = None,
    limits: Limits | None = None,
) -> tuple[Key, str]:
    """A new key and its secret, which is nowhere else."""
    key_id = secrets.token_hex(6)
    random = base64.urlsafe_b64encode(secrets.token_bytes(NUM_SECRET_BYTES)).decode().rstrip("=")
    secret = f"{PREFIX}_{key_id}_{random}"
    key = Key(
        id=key_id,
        sha256=digest(secret.encode()),
        name=name,
        owner=owner,
        role=role,
        models=models,
        created_at=now,
        expires_at=expires_at,
        limits=limits or Limits(),
    )
    return key, secret


def digest(secret: bytes) -> str:
    """What is kept of a secret."""
    return hashlib.sha256(secret).hexdigest()


def to_json(key: Key) -> dict[str, Any]:
    """The key as it is stored."""
    return {
        **{name: getattr(key, name) for name in _PLAIN},
        "role": str(key.role),
        "models": list(key.models),
        "limits": key.limits.model_dump(exclude_none=True),
    }


def from_json(value: dict[str, Any]) -> Key:
    """The key that `to_json` wrote. Raises KeyError, TypeError or ValueError for anything else."""
    return Key(
        **{name: value[name] for name in _PLAIN},
        role=Role(value["role"]),
        models=tuple(value["models"]),
        limits=Limits.model_validate(value["limits"]),
    )


_PLAIN = ("id", "sha256", "name", "owner", "created_at", "expires_at")
