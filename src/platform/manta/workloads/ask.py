"""Asks a running OpenAI-compatible endpoint, streaming, and says how fast it answered."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai

from manta.errors import InputError, MantaError
from manta.spec import AskConfig
from manta.workloads.entry import progress

DEFAULT_URL = "http://127.0.0.1:8000"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One streamed completion."""

    text: str
    num_tokens: int
    ttft_s: float
    """Time to first token, from sending the request."""
    duration_s: float

    @property
    def tokens_per_s(self) -> float:
        """Output tokens after the first, by the time that they took; 0 if there are none."""
        streaming_s = self.duration_s - self.ttft_s
        return (self.num_tokens - 1) / streaming_s if self.num_tokens > 1 and streaming_s else 0.0


def ask_all(config: AskConfig) -> dict[str, str]:
    """Ask every prompt in turn, printing each answer as it comes."""
    url = config.url or f"{os.environ.get('MANTA_SERVE_URL', DEFAULT_URL)}/v1"
    client = openai.OpenAI(
        base_url=url,
        api_key=_api_key(own=config.url is None),
        timeout=config.timeout_s,
        max_retries=0,  # they would hide failures
    )
    _check_model(client, url, config.model)
    for prompt in config.prompts:
        progress(f"--- {prompt!r}")
        answer = ask(client, config, prompt)
        progress(
            f"\n    {answer.num_tokens} tokens, first after {1000 * answer.ttft_s:.0f} ms, "
            f"then {answer.tokens_per_s:.0f} tokens/s"
        )
    return {"endpoint": url}


def ask(client: openai.OpenAI, config: AskConfig, prompt: str) -> Answer:
    """Stream one completion to stdout. Raises MantaError if the endpoint fails on the way."""
    sys.stdout.write(prompt)
    started = time.perf_counter()
    first_s, parts, num_tokens = 0.0, [], 0
    try:
        stream = client.completions.create(
            model=config.model,
            prompt=prompt,
            max_tokens=config.max_tokens,
            temperature=config.temperature,
            stream=True,
            stream_options={"include_usage": True},
        )
        for chunk in stream:
            if chunk.usage:
                num_tokens = chunk.usage.completion_tokens
            for choice in chunk.choices:
                first_s = first_s or time.perf_counter() - started
                parts.append(choice.text)
                sys.stdout.write(choice.text)
                sys.stdout.flush()
    except (openai.OpenAIError, httpx.HTTPError) as error:
        raise MantaError(f"{client.base_url}: the answer failed: {_reason(error)}") from error
    return Answer(
        text="".join(parts),
        num_tokens=num_tokens,
        ttft_s=first_s,
        duration_s=time.perf_counter() - started,
    )


def _api_key(own: bool) -> str:
    """`$OPENAI_API_KEY`, else for the cluster's own endpoint its owner's key.

    That lies in a file beside the cluster's token, and not in the job's environment: Ray shows
    the environment to everyone who may list jobs.
    """
    if given := os.environ.get("OPENAI_API_KEY"):
        return given
    token = os.environ.get("RAY_AUTH_TOKEN_PATH")
    beside = Path(token).with_name("api_key") if own and token else None
    if beside is not None and beside.exists():
        return beside.read_text().strip()
    return "none"  # the client insists on one, an endpoint without a guard does not


def _check_model(client: openai.OpenAI, url: str, model: str) -> None:
    """Raise InputError if nothing answers at `url` or it does not serve `model`."""
    try:
        known = [entry.id for entry in client.models.list()]
    except openai.APIConnectionError as error:
        raise InputError(
            f"nothing answers at {url} ({_reason(error)})",
            "deploy an endpoint with `manta deploy serve_apps/llm.yaml`, or set url",
        ) from None
    except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
        raise InputError(
            f"{url} does not take the API key ({_reason(error)})",
            "make one with `manta keys make`, and set OPENAI_API_KEY",
        ) from None
    except openai.OpenAIError as error:
        raise InputError(
            f"{url} is no OpenAI endpoint ({_reason(error)})", "set url to one, ending in /v1"
        ) from None
    if model not in known:
        raise InputError(
            f"model `{model}` is not served at {url}", f"set model to one of: {', '.join(known)}"
        )


def _reason(error: Exception) -> str:
    cause = error.__cause__ or error
    lines = str(cause).strip().splitlines()
    return lines[0][:200] if lines else type(cause).__name__
