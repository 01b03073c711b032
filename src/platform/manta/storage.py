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
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manta.errors import InputError, MantaError

if TYPE_CHECKING:
    import fsspec
    from pyarrow.fs import FileSystem as ArrowFileSystem

ROOT_VARIABLE = "MANTA_STORAGE"
SEAL = "seal.json"


def root() -> str:
    """The storage root URL: `$MANTA_STORAGE`, else a folder in the user's home.

    A path comes back absolute, since workers run in other directories than the driver.
    """
    url = os.environ.get(ROOT_VARIABLE) or str(Path.home() / ".manta" / "storage")
    return url if "://" in url else str(Path(url).expanduser().absolute())


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
    fs.invalidate_cache()  # others write too: a remembered listing would hide their files
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
    return sorted(file_sizes(url))


def file_sizes(url: str) -> dict[str, int]:
    """What `glob` finds, with sizes in bytes, from one listing. Raises InputError if it cannot."""
    fs, path = filesystem(url)
    with _explained(url, "be listed", InputError):
        if not any(char in path for char in "*?["):
            found = fs.find(path, detail=True) if fs.exists(path) else {}
        else:
            found = fs.glob(path, detail=True)
    return {
        str(name) if is_local(url) else str(fs.unstrip_protocol(name)): int(info["size"] or 0)
        for name, info in found.items()
        if info["type"] == "file"
    }


def file_marks(url: str) -> dict[str, str]:
    """Files under a folder, by name in it, with what changes when they do; from one listing.

    Raises:
        InputError: the storage cannot be listed.
    """
    fs, path = filesystem(url)
    with _explained(url, "be listed", InputError):
        found = fs.find(path, detail=True)
    return {
        str(file)[len(path) :].lstrip("/"): repr([info.get(about) for about in _MARKS])
        for file, info in found.items()
    }


_MARKS = ("size", "mtime", "ETag", "etag", "md5Hash", "LastModified", "last_modified", "updated")
"""What filesystems tell of a file's state; no two tell the same."""


def copy_file(url: str, target: Path) -> None:
    """Copy one file into a local folder, which is made. Raises MantaError if it cannot."""
    fs, path = filesystem(url)
    with explain_errors(str(target)):
        target.parent.mkdir(parents=True, exist_ok=True)
        fs.get_file(path, str(target))


def read_bytes(url: str, max_bytes: int | None = None) -> bytes:
    """The whole file. Raises InputError if it is missing, unreadable, or over `max_bytes`."""
    fs, path = filesystem(url)
    with _explained(url, "be read", InputError), fs.open(path, "rb") as file:
        data = file.read() if max_bytes is None else file.read(max_bytes + 1)
    assert isinstance(data, bytes)
    if max_bytes is not None and len(data) > max_bytes:
        raise InputError(f"{url} is larger than {max_bytes:,} bytes")
    return data


def read_json(url: str, max_bytes: int | None = None) -> Any:
    """The file as JSON. Raises InputError if it is missing or not JSON, or over `max_bytes`."""
    try:
        return json.loads(read_bytes(url, max_bytes))
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


def write_new(url: str, value: Any) -> bool:
    """Write `value` as JSON if no file is there yet; of several writers one gets True.

    Atomic on local disks and on S3, GCS and Azure (a conditional put). Other filesystems, and S3
    servers that ignore `If-None-Match`, leave a gap between looking and writing: read it back.

    Raises:
        MantaError: the storage cannot be written.
    """
    fs, path = filesystem(url)
    data = (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
    with explain_errors(url):
        try:
            if is_local(url):
                _create_local(Path(path), data)
            else:
                fs.pipe_file(path, data, mode="create")
        except OSError:
            if fs.exists(path):
                return False
            raise
    return True


def delete(url: str) -> None:
    """Delete the file or folder; it is no error if there is none."""
    fs, path = filesystem(url)
    if fs.exists(path):
        fs.rm(path, recursive=True)


def seal(
    url: str,
    facts: dict[str, Any] | None = None,
    known: Mapping[str, dict[str, Any]] | None = None,
) -> None:
    """Declare the folder complete: list its files with size and SHA-256, and add `facts`.

    `known` holds `fingerprint`s, by name in the folder, that whoever wrote the files took.
    """
    known = known or {}
    files = {name: known.get(name) or fingerprint_file(join(url, name)) for name in _sizes(url)}
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
    if not isinstance(content, dict) or not isinstance(content.get("files"), dict):
        raise _damaged(what, join(url, SEAL))
    sizes = _sizes(url)
    for name, expected in content["files"].items():
        if sizes.get(name) != expected["size_bytes"]:
            raise _damaged(what, join(url, name))
    return content


def verify(url: str, what: str) -> dict[str, Any]:
    """Like `read_seal`, and every file's content is read and compared with its SHA-256."""
    content = read_seal(url, what)
    for name, expected in content["files"].items():
        if fingerprint_file(join(url, name)) != expected:
            raise _damaged(what, join(url, name))
    return content


def _damaged(what: str, url: str) -> InputError:
    return InputError(f"{what} is damaged: {url}", "run the step that makes it")


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


def amend(url: str, files: dict[str, bytes], before: dict[str, Any], **facts: Any) -> None:
    """Add small files and facts to a sealed folder whose seal is `before`.

    The new files are unsealed while they change, so a reader in between finds a whole folder
    without them. Raises MantaError if another process sealed the folder since `before` was read.
    """
    kept = {name: mark for name, mark in before["files"].items() if name not in files}
    if read_json(join(url, SEAL)) != before:
        raise MantaError(f"{url} was replaced meanwhile", "run the step again")
    write_json(join(url, SEAL), {**before, "files": kept})
    for name, data in files.items():
        write_bytes(join(url, name), data)
    marks = {
        name: {"sha256": hashlib.sha256(data).hexdigest(), "size_bytes": len(data)}
        for name, data in files.items()
    }
    write_json(join(url, SEAL), {**before, **facts, "files": {**kept, **marks}})


@contextlib.contextmanager
def local_copy(url: str, what: str) -> Iterator[Path]:
    """A sealed folder as a local path for the time of the block; a local one is used in place."""
    if is_local(url):
        verify(url, what)
        yield Path(filesystem(url)[1])
        return
    with tempfile.TemporaryDirectory(prefix="manta-") as folder:
        _download(url, what, Path(folder))
        yield Path(folder)


def _download(url: str, what: str, folder: Path) -> None:
    """Copy a sealed folder into a local one, and check what arrived."""
    fs, path = filesystem(url)
    content = read_seal(url, what)
    with explain_errors(str(folder)):
        for name in [*content["files"], SEAL]:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            fs.get_file(join(path, name), str(target))
    verify(str(folder), what)


def cached_copy(url: str, what: str) -> Path:
    """A sealed folder as a local path that stays; downloaded once for each content."""
    if is_local(url):
        verify(url, what)
        return Path(filesystem(url)[1])
    content = read_seal(url, what)
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("MANTA_HOME", Path.home() / ".manta")) / "cache" / digest
    if not cache.exists():
        partial = cache.with_name(f"{digest}.{uuid.uuid4().hex}")
        try:
            _download(url, what, partial)
            with contextlib.suppress(OSError):
                partial.rename(cache)  # fails if another process finished the same one first
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return cache


def size(url: str) -> int:
    """Bytes of a file."""
    fs, path = filesystem(url)
    return int(fs.size(path))


def fingerprint(data: bytes) -> dict[str, Any]:
    """Size and SHA-256 of a file's content, as a seal holds them."""
    return {"sha256": hashlib.sha256(data).hexdigest(), "size_bytes": len(data)}


def fingerprint_file(url: str) -> dict[str, Any]:
    """The `fingerprint` of a file, without holding it. Raises InputError if it is unreadable."""
    fs, path = filesystem(url)
    digest = hashlib.sha256()
    num_bytes = 0
    with _explained(url, "be read", InputError), fs.open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
            num_bytes += len(chunk)
    return {"sha256": digest.hexdigest(), "size_bytes": num_bytes}


@contextlib.contextmanager
def explain_errors(url: str) -> Iterator[None]:
    """Turn an error of the storage while writing under `url` into one line on what to do."""
    with _explained(url, "be written", MantaError):
        yield


@contextlib.contextmanager
def _explained(url: str, verb: str, kind: type[MantaError]) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and not _from_storage_library(error):
            raise
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        fix = "free some space and run the step again" if full else ""
        raise kind(f"{url}: cannot {verb} ({_reason(error)})", fix) from error


def _from_storage_library(error: Exception) -> bool:
    """Whether an object store's client raised it: no network, no credentials, no bucket."""
    library = type(error).__module__.partition(".")[0]
    return library in {"botocore", "aiobotocore", "aiohttp", "gcsfs", "google", "azure"}


def _sizes(url: str) -> dict[str, int]:
    """Name in the folder → bytes, for every file but the seal, by name."""
    fs, path = filesystem(url)
    found = fs.find(path, detail=True)
    sizes = {str(file)[len(path) :].lstrip("/"): int(info["size"]) for file, info in found.items()}
    return {name: sizes[name] for name in sorted(sizes) if name != SEAL}


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


def _create_local(path: Path, data: bytes) -> None:
    """Raises FileExistsError. Whole or not at all: a link appears with all of its content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        _write_local(partial, data)
        path.hardlink_to(partial)
    finally:
        partial.unlink(missing_ok=True)


def _reason(error: Exception) -> str:
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(reason).split())
