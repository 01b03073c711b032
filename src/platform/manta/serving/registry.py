"""Models that are kept for good: numbered versions, and aliases that say which one to serve.

registry/NAME/3/…                  as models/NAME was when it was registered; never changed
registry/NAME/versions/3.json      who registered it, when; made first, so that numbers are unique
registry/NAME/aliases/ALIAS.json   which version `NAME@ALIAS` means
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass

from manta import storage
from manta.errors import InputError
from manta.workloads import layout

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_FILE = re.compile(r"([1-9]\d*)\.json")
ALIAS = re.compile(r"[a-z][a-z0-9-]{0,31}")


@dataclass(frozen=True, kw_only=True)
class Version:
    """One registered model."""

    name: str
    number: int
    content: str
    """Of the files, as deploys note it."""
    by: str
    at: float
    """UTC seconds."""
    aliases: tuple[str, ...] = ()

    @property
    def reference(self) -> str:
        """What a Serve config calls it."""
        return f"{self.name}@{self.number}"


def add(root: str, name: str, source: str, by: str) -> Version:
    """Register what lies at `source`, a sealed folder, as the next version of `name`.

    Content that is the newest version already is not registered again.

    Raises:
        InputError: no such folder, or a name that cannot be one.
        MantaError: the storage cannot be written.
    """
    _check(NAME, name, "a model's name has small letters, digits and . _ -")
    what = f"model `{source}`"
    seal = storage.read_seal(source, what)
    content = layout.model_content(seal)
    known = versions(root, name)
    if known and known[-1].content == content:
        return known[-1]
    number = _claim(root, name, content, by)
    facts = {key: value for key, value in seal.items() if key != "files"}
    with storage.local_copy(source, what) as folder:
        storage.upload(folder, layout.model(f"{name}@{number}", root), facts)
    return versions(root, name)[-1]


def promote(root: str, reference: str, alias: str, by: str) -> Version:
    """Have `NAME@ALIAS` mean version `NAME@VERSION`; what is deployed stays as it is.

    Raises:
        InputError: no such version, or a word that cannot be an alias.
    """
    _check(ALIAS, alias, "an alias is a word of small letters, digits and -")
    name, _, number = layout.name_of_version(reference, root).partition("@")
    found = [one for one in versions(root, name) if str(one.number) == number]
    if not found:
        fix = f"`manta models list {name}` shows what there is"
        raise InputError(f"model `{reference}` is not in the registry", fix)
    told = {"version": int(number), "by": by, "at": time.time()}
    storage.write_json(layout.alias(root, name, alias), told)
    return next(one for one in versions(root, name) if one.number == int(number))


def names(root: str) -> list[str]:
    """Names of all registered models."""
    return sorted({path.partition("/")[0] for path in storage.file_marks(layout.registry(root))})


def versions(root: str, name: str) -> list[Version]:
    """Versions of a model that are whole, oldest first."""
    return sorted(_versions(root, name), key=lambda one: one.number)


def _versions(root: str, name: str) -> Iterator[Version]:
    base = storage.join(layout.registry(root), name)
    files = storage.file_marks(base)
    aliases: dict[int, list[str]] = {}
    for file in files:
        folder, _, last = file.partition("/")
        if folder == "aliases" and not last.startswith("."):  # one that is being written
            version = storage.read_json(storage.join(base, file))["version"]
            aliases.setdefault(version, []).append(last.removesuffix(".json"))
    for file in files:
        folder, _, last = file.partition("/")
        made = _FILE.fullmatch(last)
        if folder == "versions" and made and f"{made[1]}/{storage.SEAL}" in files:
            told = storage.read_json(storage.join(base, file))
            named = tuple(sorted(aliases.get(int(made[1]), ())))
            yield Version(name=name, number=int(made[1]), aliases=named, **told)


def _claim(root: str, name: str, content: str, by: str) -> int:
    """The next number, which nobody else gets."""
    folder = storage.join(layout.registry(root), name, "versions")
    files = map(_FILE.fullmatch, storage.file_marks(folder))
    number = max((int(file[1]) for file in files if file), default=0) + 1
    told = {"content": content, "by": by, "at": time.time()}
    while not storage.write_new(storage.join(folder, f"{number}.json"), told):
        number += 1
    return number


def _check(pattern: re.Pattern[str], word: str, rule: str) -> None:
    if not pattern.fullmatch(word):
        raise InputError(f"`{word}`: {rule}")
