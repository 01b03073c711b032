"""Requests made from an OpenAPI document: valid ones, nearly valid ones, and nonsense."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

TEXTS = [
    *("", " ", "a", "0", "-1", "NaN", "null", "true", "1e999", "999999999999999999999", "a/b"),
    *("../x", "..", ".", "%2e%2e", "a b", "a\nb", "a\tb", "\x00", "a\x00b", "\x7f", "\u202eabc"),
    *(
        "ä" * 300,
        "🦈",
        "e\u0301",
        "\ufeffa",
        "\uffff",
        "x" * 10_000,
        "' OR 1=1 --",
        '"',
        "\\",
        "%",
    ),
    *("<script>", "${{ x }}", "{0}", "QUEUED", "job-attempt-2", "C:\\x", "s3://b/k", "__class__"),
]
SURROGATES = ["\ud800", "a\udfff"]
"""Half a character: JSON can say it, UTF-8 cannot."""
NUMBERS = [
    *(0, -0.0, 1, -1, 0.5, 1e-320, 1e308, -1e308, 2**31, 2**53 + 1, 2**62, 2**63 - 1, 2**63),
    *(-(2**63) - 1, 2**70, 10**400, float("nan"), float("inf"), float("-inf")),
]


def nested(depth: int) -> Any:
    """Lists and objects in each other."""
    value: Any = "a"
    for level in range(depth):
        value = [value] if level % 2 else {"a": value}
    return value


OTHERS: list[Any] = [None, True, False, [], [[]], [None], {}, {"a": {"b": [1]}}, {"": ""}]
OTHERS += [nested(20), nested(200), nested(700)]
BODIES = [
    *(b"", b"null", b"{", b"[]", b"{}", b"\xff", b"\xef\xbb\xbf{}", b"{} {}", b"'a'", b'"a"'),
    *(b"[" * 100_000, b'{"a":' * 50_000, b'{"id":1,"id":"a"}', b"-", b"1e9999", b"9" * 5000),
]
MEDIA = ["application/json"] * 8 + ["text/plain", "application/x-www-form-urlencoded", "", "a;b"]


@dataclass(frozen=True)
class Call:
    """One request."""

    operation: str
    """Method and path as the document has it."""
    method: str
    url: str
    headers: Mapping[str, str]
    content: bytes


@dataclass
class Maker:
    """Makes requests; `known` are values of parameters and fields that mean something there."""

    document: Mapping[str, Any]
    chance: random.Random
    known: Mapping[str, list[str]]
    keys: list[Mapping[str, str]]
    operations: list[tuple[str, str, Mapping[str, Any]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        paths = self.document["paths"].items()
        self.operations = [(path, m, told) for path, ms in paths for m, told in ms.items()]

    def call(self) -> Call:
        """One request; how odd it is differs from one to the next."""
        path, method, told = self.chance.choices(self.operations, self._weights())[0]
        odd = self.chance.choice([0.0, 0.0, 0.1, 0.5])
        url, query = path, []
        for parameter in told.get("parameters", ()):
            name = parameter["name"]
            if parameter["in"] == "path":
                url = url.replace(f"{{{name}}}", quote(self._place(parameter, odd), safe=""))
            elif self.chance.random() < 0.5:
                value = self.value(parameter["schema"], odd)
                values = value if isinstance(value, list) else [value]
                query += [f"{name}={quote(_text(one), safe='')}" for one in values]
        headers, content = dict(self.chance.choice(self.keys)), b""
        if "requestBody" in told:
            headers["Content-Type"] = self.chance.choice(MEDIA) if odd else MEDIA[0]
            content = self._body(told["requestBody"]["content"]["application/json"]["schema"], odd)
        url += "?" + "&".join(query) if query else ""
        return Call(f"{method} {path}", method, url, headers, content)

    def _weights(self) -> list[int]:
        """Most can go wrong where a body is read."""
        return [8 if "requestBody" in told else 1 for _, _, told in self.operations]

    def value(self, schema: Mapping[str, Any], odd: float) -> Any:
        """A value that a schema allows; with probability `odd`, here or further in, another."""
        if self.chance.random() < odd:
            return self._odd(schema)
        if "$ref" in schema:
            return self.value(self._resolve(schema["$ref"]), odd)
        if options := schema.get("anyOf") or schema.get("oneOf"):
            return self.value(self.chance.choice(options), odd)
        if "const" in schema:
            return schema["const"]
        if "enum" in schema:
            return self.chance.choice(schema["enum"])
        make = getattr(self, f"_{schema.get('type', 'any')}")
        return make(schema, odd)

    def _resolve(self, reference: str) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.document["components"]["schemas"][
            reference.rpartition("/")[2]
        ]
        return found

    def _place(self, parameter: Mapping[str, Any], odd: float) -> str:
        known = self.known.get(parameter["name"], [])
        if known and self.chance.random() >= odd:
            return self.chance.choice(known)
        return _text(self.value(parameter["schema"], odd)).replace("/", "%") or "a"

    def _body(self, schema: Mapping[str, Any], odd: float) -> bytes:
        if odd and self.chance.random() < 0.1:
            return self.chance.choice(BODIES)
        return json.dumps(self.value(schema, odd)).encode()

    def _odd(self, schema: Mapping[str, Any]) -> Any:
        """Beyond a limit of the schema, or anything at all."""
        limits = [v for k, v in schema.items() if "imum" in k and isinstance(v, int | float)]
        if limits and self.chance.random() < 0.5:
            return self.chance.choice(limits) + self.chance.choice([-1, 0, 1, 1e-9])
        if "maxLength" in schema and self.chance.random() < 0.3:
            return "a" * (schema["maxLength"] + self.chance.choice([0, 1]))
        return self.anything(2)

    def anything(self, depth: int) -> Any:
        """A JSON value of any kind."""
        kind = self.chance.randrange(7 if depth else 5)
        if kind < 2:
            return self.chance.choice(TEXTS)
        if kind == 2:
            return self.chance.choice(NUMBERS)
        if kind == 3:
            return self.chance.choice(OTHERS)
        if kind == 4:
            return self.chance.choice(SURROGATES)
        if kind == 5:
            return [self.anything(depth - 1) for _ in range(self.chance.randrange(4))]
        return {self._key(): self.anything(depth - 1) for _ in range(self.chance.randrange(4))}

    def _key(self) -> str:
        return self.chance.choice(TEXTS + SURROGATES)

    def _any(self, schema: Mapping[str, Any], odd: float) -> Any:
        return self.anything(2) if odd else self.chance.choice(["a", 1, None, {"b": [True]}])

    def _string(self, schema: Mapping[str, Any], odd: float) -> str:
        longest = min(schema.get("maxLength", 40), 40)
        length = self.chance.randint(max(1, schema.get("minLength", 1)), longest)
        return "a" + "".join(self.chance.choices("abcxyz019-", k=length - 1))

    def _integer(self, schema: Mapping[str, Any], odd: float) -> int:
        least = schema.get("minimum", schema.get("exclusiveMinimum", -1) + 1)
        most = schema.get("maximum", least + 10**9)
        return int(self.chance.choice([least, most, self.chance.randint(int(least), int(most))]))

    def _number(self, schema: Mapping[str, Any], odd: float) -> float:
        least = schema.get("minimum", schema.get("exclusiveMinimum", 0.0))
        most = schema.get("maximum", least + 1e6)
        return float(self.chance.uniform(least + 1e-6, min(most, least + 1e6)))

    def _boolean(self, schema: Mapping[str, Any], odd: float) -> bool:
        return self.chance.random() < 0.5

    def _null(self, schema: Mapping[str, Any], odd: float) -> None:
        return None

    def _array(self, schema: Mapping[str, Any], odd: float) -> list[Any]:
        items = schema.get("items", {})
        return [self.value(items, odd) for _ in range(self.chance.randrange(4))]

    def _object(self, schema: Mapping[str, Any], odd: float) -> dict[str, Any]:
        required = schema.get("required", ())
        made = {
            name: self.chance.choice(self.known[name])
            if name in self.known and self.chance.random() >= odd
            else self.value(told, odd)
            for name, told in schema.get("properties", {}).items()
            if name in required or self.chance.random() < 0.4
        }
        further = schema.get("additionalProperties", False)
        if isinstance(further, dict) or further is True:
            told = further if isinstance(further, dict) else {}
            keys = ["GPU", "a", "env_vars"] if not odd else [self._key(), "a"]
            made |= {key: self.value(told, odd) for key in keys if self.chance.random() < 0.5}
        if self.chance.random() < odd:
            made[self._key()] = self.anything(1)
        if made and self.chance.random() < odd / 2:
            del made[self.chance.choice(list(made))]
        return made


def _text(value: Any) -> str:
    """As it stands in an address; half a character cannot."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text.encode("utf-8", "replace").decode()
