"""Generates broken YAML files from good ones, the same for the same seed."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import yaml

Seeds = list[dict[str, Any]]

_ODD_VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    1e308,
    float("nan"),
    2**80,
    "",
    "x" * 5000,
    "\x00\x07\u2028",
    "../" * 2000,
    [],
    {},
    [[[]]],
    {"": {"": None}},
    {"a": [1, {"b": None}]},
    ["a", 1, None],
)


def mutated(seeds: Seeds, rng: random.Random) -> bytes:
    """A good file in which some values are of another type."""
    value = copy.deepcopy(rng.choice(seeds))
    for _ in range(rng.randint(1, 4)):
        parent, key = _somewhere(value, rng)
        parent[key] = rng.choice(_ODD_VALUES)
    return _dump(value).encode()


def _dump(value: Any) -> str:
    text: str = yaml.dump(value, Dumper=yaml.CSafeDumper, allow_unicode=True)
    return text


def _somewhere(value: Any, rng: random.Random) -> tuple[Any, Any]:
    while True:
        key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        inner = value[key]
        if not isinstance(inner, dict | list) or not inner or rng.random() < 0.3:
            return value, key
        value = inner


def cut(seeds: Seeds, rng: random.Random) -> bytes:
    """A file that ends inside a quoted string."""
    text = _dump(rng.choice(seeds))
    return f'{text[: rng.randrange(len(text))]}\n"cut'.encode()


def noisy(seeds: Seeds, rng: random.Random) -> bytes:
    """A file with flipped bytes, of which one is never UTF-8."""
    data = bytearray(_dump(rng.choice(seeds)).encode())
    for _ in range(rng.randint(1, 20)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data) + b"\xff"


def encoded(seeds: Seeds, rng: random.Random) -> bytes:
    """A file in another encoding."""
    text = "# Größe: ∞\n" + _dump(rng.choice(seeds))
    return text.encode(rng.choice(("utf-16", "utf-16-be", "utf-32", "latin-1")), errors="replace")


def nested(seeds: Seeds, rng: random.Random) -> bytes:
    """Nesting of up to 100,000 levels."""
    depth = rng.choice((200, 5_000, 100_000))
    opening, closing = rng.choice((("[", "]"), ("{a: ", "}"), ("- ", ""), ("? ", "")))
    return f"cluster_name: t\nprovider: {opening * depth}{closing * depth}".encode()


def bomb(seeds: Seeds, rng: random.Random) -> bytes:
    """Aliases that name very many values, or themselves."""
    width, depth = rng.randint(5, 12), rng.randint(8, 20)
    form = rng.choice(("[{}]", "{{<<: [{}]}}"))
    lines = ["provider: &a0 {x: 1}"]
    for i in range(depth):
        lines.append(f"k{i}: &a{i + 1} " + form.format(", ".join([f"*a{i}"] * width)))
    if rng.random() < 0.2:
        lines.append("self: &me [*me]")
    return "\n".join(lines).encode()


def flooded(seeds: Seeds, rng: random.Random) -> bytes:
    """Very many unknown keys, or very long ones."""
    count, length = rng.choice(((10_000, 8), (10, 100_000), (2_000, 100)))
    keys = (f"k{i}{'e' * length}: 1" for i in range(count))
    return ("cluster_name: t\nprovider: {type: aws}\n" + "\n".join(keys)).encode()


def scalars(seeds: Seeds, rng: random.Random) -> bytes:
    """Scalars that crash or stall careless readers."""
    odd = rng.choice(_ODD_SCALARS)
    return f"cluster_name: t\nprovider:\n  type: {odd}\n".encode()


_ODD_SCALARS = (
    "9" * 100_000,
    ":".join(["1"] * 200_000),
    "2020-13-45",
    "!!timestamp z",
    "!!bool z",
    "!!int x",
    "!!python/object:os.system {}",
    "*nowhere",
    "&a",
    "%x",
    "@x",
    "`x`",
)

Maker = Callable[[Seeds, random.Random], bytes]
QUICK: tuple[Maker, ...] = (cut, noisy, encoded, nested, scalars)
HEAVY: tuple[Maker, ...] = (bomb, flooded)
"""Read up to a limit before they are refused, which takes a while: one in 25."""


def generate(seeds: Seeds, count: int, seed: int) -> Iterator[tuple[str, bytes, bool]]:
    """`count` files as (how it was made, content, whether it is broken for certain)."""
    rng = random.Random(seed)
    for i in range(count):
        if i % 2:
            yield "mutated", mutated(seeds, rng), False
        else:
            make = rng.choice(HEAVY if i % 50 == 0 else QUICK)
            yield make.__name__, make(seeds, rng), True
