"""Text to a versioned dataset of token blocks, on Ray Data.

    files ──read, clean──► rows ──shuffle by hash──► documents of a shard, each text once
          ──► tokenizer ──► blocks of a shard ──► manifest, seal

A shard is a range of document hashes, and how many there are follows from the inputs' sizes alone.
So which task ran where, when or twice changes no byte of the output, and no step holds more than
one shard in memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from manta import storage
from manta.errors import InputError
from manta.spec import PrepareConfig
from manta.workloads import code, entry, layout, session, shards, text, tokenizer
from manta.workloads.shards import Collected, Fingerprint, Packed, Place
from manta.workloads.text import InputFile

SMALL_SHARD_BYTES = 16 * 2**20
LARGE_SHARD_BYTES = 256 * 2**20
MANY_SHARDS = 64
"""Up to so many, shards are small, for more CPUs; beyond, they are large, for fewer files."""
COMPRESSION_RATIO = 4
"""Text bytes taken for one byte of a compressed file."""


SHAPING = ("text", "tokenizer", "packing", "shards", "prepare")
"""Modules that decide a dataset's content; a change elsewhere leaves its version alone."""


@dataclass(frozen=True, kw_only=True)
class Build:
    """A dataset in the making."""

    config: PrepareConfig
    files: tuple[InputFile, ...]
    fingerprints: dict[str, Fingerprint]
    """Input name → content."""
    tokenizer_files: dict[str, bytes] | None
    """The tokenizer to use, or None to train one."""
    version: str
    place: Place


def prepare(config: PrepareConfig) -> dict[str, str]:
    """Make the dataset, or find that it is there; returns artifact name → URL.

    Raises:
        InputError: an input, the tokenizer or the config cannot be used.
        MantaError: the output cannot be written.
    """
    files = text.list_inputs(config)
    loaded = tokenizer.read_folder(config.tokenizer.load) if config.tokenizer.load else None
    _check_vocab_size(config, loaded)
    session.connect()
    build = _identify(config, files, loaded)
    if not _reuse(build):
        with _removed_on_failure(build.place.url):
            _make(build)
    storage.write_bytes(layout.newest(config.name), build.version.encode() + b"\n")
    return {"dataset": build.place.url, "tokenizer": build.place.tokenizer}


def _check_vocab_size(config: PrepareConfig, loaded: dict[str, bytes] | None) -> None:
    if loaded is None or "vocab_size" not in config.tokenizer.model_fields_set:
        return
    size = tokenizer.vocab_size(
        tokenizer.parse(loaded["tokenizer.json"], str(config.tokenizer.load))
    )
    if size != config.tokenizer.vocab_size:
        raise InputError(
            f"tokenizer.vocab_size is {config.tokenizer.vocab_size:,}, but the tokenizer in"
            f" {config.tokenizer.load} has {size:,} tokens",
            "delete vocab_size when you load a tokenizer",
        )


def _identify(
    config: PrepareConfig, files: tuple[InputFile, ...], loaded: dict[str, bytes] | None
) -> Build:
    """Read every input once to name the dataset by its content, before any heavy work."""
    started = time.monotonic()
    fingerprints = shards.fingerprints([file.name for file in files], _sizes(files))
    version = version_of(config, fingerprints, loaded)
    num_bytes = sum(_sizes(files).values())
    entry.progress(
        f"input: {len(files):,} files, {_megabytes(num_bytes)}; dataset {config.name}@{version}"
        f" ({time.monotonic() - started:.1f} s)"
    )
    return Build(
        config=config,
        files=files,
        fingerprints=fingerprints,
        tokenizer_files=loaded,
        version=version,
        place=Place(layout.dataset(config.name, version)),
    )


def version_of(
    config: PrepareConfig, inputs: dict[str, Fingerprint], loaded: dict[str, bytes] | None
) -> str:
    """Hash of the inputs' content, the parameters (not the name) and the code."""
    identity = {
        "code": code.version(*SHAPING),
        "inputs": sorted(content["sha256"] for content in inputs.values()),
        "parameters": config.model_dump(mode="json", exclude={"name"}),
        "tokenizer": {
            name: hashlib.sha256(data).hexdigest() for name, data in (loaded or {}).items()
        },
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def _sizes(files: Sequence[InputFile]) -> dict[str, int]:
    return {file.name: file.size_bytes for file in files}


def _reuse(build: Build) -> bool:
    """Whether the dataset is there and whole; removes one that is not."""
    url, what = build.place.url, f"dataset {build.config.name}@{build.version}"
    if not storage.exists(url):
        return False
    try:
        sealed = storage.read_seal(url, what)["files"]
        sizes = {storage.join(url, name): item["size_bytes"] for name, item in sealed.items()}
        found = shards.fingerprints(list(sizes), sizes)
        whole = all(found[storage.join(url, name)] == item for name, item in sealed.items())
    except InputError:
        whole = False
    if whole:
        entry.progress(f"{what} is there already and whole: same input and config, same version")
        return True
    entry.progress(f"{what} is unfinished or damaged: removing it and making it again")
    storage.delete(url)
    return False


@contextlib.contextmanager
def _removed_on_failure(url: str) -> Iterator[None]:
    """Leave no half-written folder behind; one that a kill leaves has no seal."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(Exception):  # the first error is the one to show
            storage.delete(url)
        raise


def _make(build: Build) -> None:
    collected = _collect(build)
    kept = _keep(build.config, collected)
    size = _tokenizer(build, kept)
    packed = _pack(build, kept, size)
    _check_blocks(build.config, packed)
    _finish(build, collected, packed, size)


def _collect(build: Build) -> list[Collected]:
    started = time.monotonic()
    collected = shards.collect(build.files, build.config, num_shards(build.files), build.place)
    total = _totals(collected)
    entry.progress(
        f"documents: {total['read']:,} read, {total['kept']:,} kept; dropped"
        f" {total['too_short']:,} too short, {total['duplicates']:,} duplicates,"
        f" {total['not_text']:,} not UTF-8 text ({time.monotonic() - started:.1f} s)"
    )
    if total["not_text"]:
        names = ", ".join([name for shard in collected for name in shard.not_text][:3])
        entry.progress(f"warning: skipped {total['not_text']:,} files that are not text: {names}")
    if not total["kept"]:
        raise InputError(
            f"no document is left of {total['read']:,} read: {total['too_short']:,} shorter than"
            f" {build.config.min_document_chars} characters, {total['not_text']:,} not UTF-8 text",
            "lower min_document_chars or check the inputs",
        )
    return collected


def num_shards(files: Sequence[InputFile]) -> int:
    """How many shards the files make; a function of their sizes alone."""
    size = sum(estimated_text_bytes(file) for file in files)
    small, large = -(-size // SMALL_SHARD_BYTES), -(-size // LARGE_SHARD_BYTES)
    return max(min(small, MANY_SHARDS), large, 1)


def estimated_text_bytes(file: InputFile) -> int:
    """Bytes of text in a file, before it is read."""
    plain = file.format != "parquet" and not file.name.endswith((".gz", ".bz2", ".xz", ".zst"))
    return file.size_bytes * (1 if plain else COMPRESSION_RATIO)


def _totals(collected: Sequence[Collected]) -> dict[str, int]:
    return {
        "read": sum(shard.num_read for shard in collected),
        "kept": sum(shard.num_documents for shard in collected),
        "too_short": sum(shard.num_too_short for shard in collected),
        "duplicates": sum(shard.num_duplicates for shard in collected),
        "not_text": sum(len(shard.not_text) for shard in collected),
    }


def _keep(config: PrepareConfig, collected: Sequence[Collected]) -> dict[int, int]:
    """Shard → how many of its documents to take, so that all are the first by hash."""
    left = config.max_documents or sum(shard.num_documents for shard in collected)
    kept = {}
    for shard in collected:
        if taken := min(left, shard.num_documents):
            kept[shard.index] = taken
            left -= taken
    return kept


def _tokenizer(build: Build, kept: dict[int, int]) -> int:
    """Put the tokenizer in its place; returns the size of its vocabulary."""
    started = time.monotonic()
    if build.tokenizer_files is not None:
        tokenizer.write_folder(build.tokenizer_files, build.place.tokenizer)
    else:
        shards.train_tokenizer(kept, build.config, build.place)
    size = tokenizer.vocab_size(tokenizer.load(build.place.tokenizer)[0])
    done = "trained" if build.tokenizer_files is None else "loaded"
    entry.progress(f"tokenizer: {size:,} tokens, {done} ({time.monotonic() - started:.1f} s)")
    return size


def _pack(build: Build, kept: dict[int, int], size: int) -> Packed:
    started = time.monotonic()
    packed = shards.pack(kept, build.config, build.place, size)
    for split, counts in packed.splits.items():
        entry.progress(
            f"{split}: {counts['documents']:,} documents, {_megabytes(counts['bytes'])},"
            f" {counts['tokens']:,} tokens in {counts['blocks']:,} blocks"
        )
    entry.progress(f"packed {len(kept):,} shards ({time.monotonic() - started:.1f} s)")
    return packed


def _check_blocks(config: PrepareConfig, packed: Packed) -> None:
    for split, counts in packed.splits.items():
        if not counts["blocks"]:
            what = (
                f"the {split} split is empty"
                if not counts["documents"]
                else f"the {split} split has {counts['tokens_left_over']:,} tokens, too few for"
                f" one block of {config.sequence_length}"
            )
            raise InputError(
                what, "add documents, or change validation_fraction or sequence_length"
            )


def _finish(build: Build, collected: Sequence[Collected], packed: Packed, vocab_size: int) -> None:
    """Write what describes the dataset, and seal it."""
    url = build.place.url
    storage.delete(build.place.work)
    storage.write_json(storage.join(url, "unigram.json"), {"counts": packed.token_counts})
    outputs = packed.files | {
        file.removeprefix(f"{url}/"): storage.fingerprint_file(file)
        for file in [storage.join(url, "unigram.json"), *storage.glob(build.place.tokenizer)]
    }
    manifest = {
        "version": build.version,
        "code_version": code.version(*SHAPING),
        "parameters": build.config.model_dump(mode="json", exclude={"name"}),
        "sequence_length": build.config.sequence_length,
        "vocab_size": vocab_size,
        "documents": _totals(collected) | {"used": packed.num_documents},
        **packed.splits,
        "inputs": build.fingerprints,
        "outputs": outputs,
    }
    storage.write_json(storage.join(url, "manifest.json"), manifest)
    storage.seal(url, {"kind": "dataset", "version": build.version}, known=outputs)


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"
