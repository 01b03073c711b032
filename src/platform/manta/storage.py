"""The one seam to files: a root URL for fsspec, and folders that are whole or absent.

A folder (dataset, model, checkpoint) counts as written when its *seal* lies beside its files: a
JSON file, written last and atomically, with size and SHA-256 of every file. Readers check it, so
what a crash, a full disk or a cut upload left behind is never taken for the real thing.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manta.errors import InputError, MantaError

if TYPE_CHECKING:
    import fsspec
    from pyarrow.fs import FileSystem as ArrowFileSystem

ROOT_VARIABLE = "MANTA_STORAGE"
SEAL = "seal.json"


def root() -> str:
    """The storage root URL: `$MANTA_STORAGE`, else a folder in the user's home."""
    return os.environ.get(ROOT_VARIABLE) or str(Path.home() / ".manta" / "storage")


def join(url: str, *parts: str) -> str:
    """`url` extended by path parts."""
    return "/".join([url.rstrip("/"), *(part.strip("/") for part in parts)])


def filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The fsspec filesystem for `url`, and the path in it. Raises InputError if none fits."""
    import fsspec

    try:
        fs, path = fsspec.core.url_to_fs(_expand(url))
    except (ValueError, ImportError) as error:
        raise InputError(
            f"{url}: no filesystem for this URL ({error})",
            "use a path, or a URL that fsspec knows, such as s3://bucket/folder",
        ) from None
    return fs, str(path)


def arrow_filesystem(url: str) -> tuple[ArrowFileSystem, str]:
    """The same seam as pyarrow sees it, for Ray Data and Ray Train."""
    from pyarrow.fs import FSSpecHandler, LocalFileSystem, PyFileSystem

    fs, path = filesystem(url)
    if is_local(url):
        return LocalFileSystem(), path
    return PyFileSystem(FSSpecHandler(fs)), path


def _expand(url: str) -> str:
    return str(Path(url).expanduser()) if "://" not in url else url


def is_local(url: str) -> bool:
    """Whether `url` is a path on this machine."""
    return "://" not in url or url.startswith("file://")


def exists(url: str) -> bool:
    """Whether a file or folder lies at `url`."""
    fs, path = filesystem(url)
    return bool(fs.exists(path))


def glob(url: str) -> list[str]:
    """Files that match a URL with `*`, `**` or `?`, or lie under a folder; sorted full URLs."""
    fs, path = filesystem(url)
    if not any(char in path for char in "*?["):
        found = fs.find(path) if fs.isdir(path) else [path] if fs.exists(path) else []
    else:
        found = [name for name in fs.glob(path) if not fs.isdir(name)]
    return sorted(fs.unstrip_protocol(name) if not is_local(url) else str(name) for name in found)


def read_bytes(url: str) -> bytes:
    """The whole file. Raises InputError if it is missing or unreadable."""
    fs, path = filesystem(url)
    try:
        with fs.open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise InputError(f"{url}: cannot be read ({_reason(error)})") from None
    assert isinstance(data, bytes)
    return data


def read_json(url: str) -> Any:
    """The file as JSON. Raises InputError if it is missing or not JSON."""
    try:
        return json.loads(read_bytes(url))
    except ValueError:
        raise InputError(
            f"{url}: not JSON, or cut short", "delete it and run its step again"
        ) from None


def write_bytes(url: str, data: bytes) -> None:
    """Write the file so that it appears whole or not at all. Raises MantaError on a full disk."""
    fs, path = filesystem(url)
    with explain_errors(url):
        if not is_local(url):
            fs.pipe_file(path, data)  # an object store's put is atomic
            return
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        _write_local(Path(path), data)


def write_json(url: str, value: Any) -> None:
    """Write `value` as indented JSON with sorted keys, atomically."""
    write_bytes(url, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def delete(url: str) -> None:
    """Delete the file or folder; it is no error if there is none."""
    fs, path = filesystem(url)
    if fs.exists(path):
        fs.rm(path, recursive=True)


def seal(url: str, facts: dict[str, Any] | None = None) -> None:
    """Declare the folder complete: list its files with size and SHA-256, and add `facts`."""
    files = {name: _fingerprint(join(url, name)) for name in _names(url)}
    write_json(join(url, SEAL), {"files": files, **(facts or {})})


def read_seal(url: str, what: str) -> dict[str, Any]:
    """The seal of a complete folder.

    Raises:
        InputError: there is no such folder, it was never finished, or a file has another size;
            `what` names it for the user, as in "model `quickstart`".
    """
    if not exists(join(url, SEAL)):
        state = "was never finished" if exists(url) else "does not exist"
        raise InputError(f"{what} {state} ({url})", "run the step that makes it")
    content: dict[str, Any] = read_json(join(url, SEAL))
    for name, fingerprint in content["files"].items():
        if not exists(join(url, name)) or size(join(url, name)) != fingerprint["size_bytes"]:
            raise InputError(f"{what} is damaged: {join(url, name)}", "run the step that makes it")
    return content


def verify(url: str, what: str) -> dict[str, Any]:
    """Like `read_seal`, and every file's content is read and compared with its SHA-256."""
    content = read_seal(url, what)
    for name, fingerprint in content["files"].items():
        if _fingerprint(join(url, name)) != fingerprint:
            raise InputError(f"{what} is damaged: {join(url, name)}", "run the step that makes it")
    return content


def upload(folder: str | Path, url: str, facts: dict[str, Any] | None = None) -> None:
    """Copy a local folder to `url`, replacing what is there, and seal it."""
    fs, path = filesystem(url)
    with explain_errors(url):
        if fs.exists(join(path, SEAL)):
            fs.rm(join(path, SEAL))  # first, so that a reader never sees old seal and new files
        delete(url)
        for file in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
            target = join(path, file.relative_to(folder).as_posix())
            fs.makedirs(target.rpartition("/")[0], exist_ok=True)
            fs.put_file(str(file), target)
        seal(url, facts)


@contextlib.contextmanager
def local_copy(url: str, what: str) -> Iterator[Path]:
    """A sealed folder as a local path for the time of the block; a local one is used in place."""
    content = verify(url, what)
    fs, path = filesystem(url)
    if is_local(url):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="manta-") as folder:
        for name in [*content["files"], SEAL]:
            target = Path(folder, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            fs.get_file(join(path, name), str(target))
        yield Path(folder)


def cached_copy(url: str, what: str) -> Path:
    """A sealed folder as a local path that stays; downloaded once for each content."""
    if is_local(url):
        verify(url, what)
        return Path(filesystem(url)[1])
    content = read_seal(url, what)
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("MANTA_HOME", Path.home() / ".manta")) / "cache" / digest
    if not cache.exists():
        cache.parent.mkdir(parents=True, exist_ok=True)
        partial = cache.with_name(f"{digest}.{uuid.uuid4().hex}")
        with local_copy(url, what) as folder:
            shutil.copytree(folder, partial)
        try:
            partial.rename(cache)
        except OSError:  # another process finished the same download first
            shutil.rmtree(partial)
    return cache


def size(url: str) -> int:
    """Bytes of a file."""
    fs, path = filesystem(url)
    return int(fs.size(path))


@contextlib.contextmanager
def explain_errors(url: str) -> Iterator[None]:
    """Turn an OSError while writing under `url` into one line that says what to do."""
    try:
        yield
    except OSError as error:
        fix = "free some space and run the step again" if error.errno == errno.ENOSPC else ""
        raise MantaError(f"cannot write {url}: {_reason(error)}", fix) from error


def _names(url: str) -> list[str]:
    fs, path = filesystem(url)
    found = (str(name)[len(path) :].lstrip("/") for name in fs.find(path))
    return sorted(name for name in found if name != SEAL)


def _fingerprint(url: str) -> dict[str, Any]:
    fs, path = filesystem(url)
    digest = hashlib.sha256()
    num_bytes = 0
    with fs.open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
            num_bytes += len(chunk)
    return {"sha256": digest.hexdigest(), "size_bytes": num_bytes}


def _write_local(path: Path, data: bytes) -> None:
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _reason(error: OSError) -> str:
    return error.strerror or str(error) or type(error).__name__
