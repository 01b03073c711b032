"""Models of the Hugging Face Hub: is there one of this name, and which content is it now.

vLLM downloads the files on each node, with the same library. What is asked here, before a deploy,
saves the minutes until a replica fails on a misspelt name, and gives all replicas one commit.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from manta.errors import InputError, MantaError

TIMEOUT_S = 20
_COMMIT = re.compile(r"[0-9a-f]{40}")
_TRUE = ("1", "on", "yes", "true")


@dataclass(frozen=True, kw_only=True)
class Hub:
    """Where replicas look for models, and who they are there."""

    endpoint: str
    token: str | None
    offline: bool
    """Replicas take what lies in their nodes' caches and ask nobody."""


def hub_of(variables: Mapping[str, str]) -> Hub:
    """As replicas with these environment variables, over this process's own, see the Hub."""
    given = {**os.environ, **{name: str(value) for name, value in variables.items()}}
    return Hub(
        endpoint=(given.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/"),
        token=given.get("HF_TOKEN") or None,
        offline=given.get("HF_HUB_OFFLINE", "").lower() in _TRUE,
    )


def commit(hub: Hub, model: str, revision: str | None) -> str | None:
    """The commit that `revision` (a branch, a tag, a commit; None: the default branch) means now.

    None where replicas do not ask the Hub either.

    Raises:
        InputError: no such model or revision, or it is not for this token.
        MantaError: the Hub cannot be reached.
    """
    if hub.offline or (revision and _COMMIT.fullmatch(revision)):
        return revision
    from huggingface_hub import HfApi, errors

    what = f"model `{model}`" + (f", revision `{revision}`" if revision else "")
    fix = "check `model_source`; a private model needs HF_TOKEN in the replicas' environment"
    api = HfApi(endpoint=hub.endpoint, token=hub.token or False)
    try:
        return str(api.model_info(model, revision=revision, timeout=TIMEOUT_S).sha)
    except errors.HFValidationError:
        raise InputError(f"{what}: not a name as the Hub has them", "write ORG/NAME") from None
    except errors.RevisionNotFoundError:
        raise InputError(f"{what}: the Hub has no such revision", "check `revision`") from None
    except errors.GatedRepoError:
        raise InputError(f"{what}: not open to this HF_TOKEN", f"ask at {hub.endpoint}") from None
    except errors.RepositoryNotFoundError:
        raise InputError(f"{what}: {hub.endpoint} has no such model", fix) from None
    except (_network_error(), OSError) as error:
        raise MantaError(
            f"{what}: {hub.endpoint} cannot be asked ({type(error).__name__})",
            'with the model in the nodes\' caches say `HF_HUB_OFFLINE: "1"` in `runtime_env`, '
            "`env_vars`",
        ) from None


def _network_error() -> type[Exception]:
    """Of whichever HTTP library the client is made with: its own errors derive from that one's."""
    from huggingface_hub.errors import HfHubHTTPError

    base = HfHubHTTPError.__bases__[0]
    assert issubclass(base, Exception)
    return base
