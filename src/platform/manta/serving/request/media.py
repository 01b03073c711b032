"""Pictures, sounds and videos in a request: how many, and whether an engine may fetch them.

An engine that fetches what clients name reaches what they cannot: the cloud's metadata service,
other services of the cluster, files. Files are never fetched for a request. Which hosts are is up
to the engine's own `allowed_media_domains`, which the builder closes where a config says nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from manta.serving.openai_errors import bad_request

CLOSED = "none: name them in engine_kwargs.allowed_media_domains"
"""In place of a list of hosts: vLLM shows the list to who asks for another, and it is no host."""
SCHEMES = ("data:", "http://", "https://")
_PARTS = ("image_url", "audio_url", "video_url")
_CONTENT = ("input_audio", "image_embeds", "audio_embeds", "video_embeds", "image_pil")
_NAMES = frozenset((*_PARTS, *_CONTENT))
_NOT_CONTENT = ("tools", "functions", "response_format", "structured_outputs")


def count(body: dict[str, Any]) -> int:
    """How many there are.

    Raises:
        Refused: an address that is neither `data:` nor HTTP.
    """
    found = 0
    content = {name: value for name, value in body.items() if name not in _NOT_CONTENT}
    for name, value in _named(content):
        found += value is not None
        url = value.get("url") if isinstance(value, dict) else value
        if name in _PARTS and isinstance(url, str) and not url.lower().startswith(SCHEMES):
            raise bad_request(f"`{name}` is neither a data: URL nor of http(s)", name)
    return found


def _named(value: Any) -> Iterator[tuple[str, Any]]:
    """What stands under a name, however deep."""
    for inner in value.values() if isinstance(value, dict) else value:
        if isinstance(inner, (dict, list)):
            yield from _named(inner)
    if isinstance(value, dict):
        yield from ((name, inner) for name, inner in value.items() if name in _NAMES)
        if value.get("type") in _PARTS and "url" in value:  # as vLLM's own routes have them
            yield value["type"], value["url"]
