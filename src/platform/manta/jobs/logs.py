"""A job's log in storage: parts that only grow, written while the job runs.

A part is named by the offset of its first byte. The last one is written anew, longer, until it is
full: object stores cannot append, and so many small files would cost more than the rewriting. What
is there is all that a writer needs in order to go on, after a crash too; nothing about it is in
the database.
"""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import quote

from manta import storage

PART_BYTES = 512 * 1024


def folder(storage_url: str, job_id: str, attempt: int) -> str:
    """Where the parts of one attempt's log lie."""
    return storage.join(storage_url, "logs", quote(job_id, safe=""), f"{attempt:04d}")


class LogWriter:
    """Appends to one attempt's log. One writer at a time; what two write is the same bytes."""

    def __init__(self, url: str) -> None:
        self.url = url
        sizes = _parts(url)
        self._start = max(sizes, default=0)
        last = sizes.get(self._start, 0)
        self._open = b""
        if last >= PART_BYTES:
            self._start += last
        elif last:
            self._open = storage.read_bytes(_part(url, self._start))

    @property
    def num_bytes(self) -> int:
        """Bytes that are in storage."""
        return self._start + len(self._open)

    def append(self, data: bytes) -> None:
        """Write `data` after what is there. Raises MantaError, and then nothing has changed."""
        view = self._open + data
        storage.write_bytes(_part(self.url, self._start), view)
        if len(view) >= PART_BYTES:
            self._start, self._open = self._start + len(view), b""
        else:
            self._open = view


def read(url: str, offset: int = 0) -> Iterator[bytes]:
    """The log from `offset` on, in pieces, as far as it is in storage now."""
    for start, size in sorted(_parts(url).items()):
        if start + size > offset:
            data = storage.read_bytes(_part(url, start))[max(0, offset - start) :]
            offset = max(offset, start) + len(data)
            yield data


def size(url: str) -> int:
    """Bytes of the log that are in storage now."""
    return max((start + size for start, size in _parts(url).items()), default=0)


def _parts(url: str) -> dict[int, int]:
    """Offset → size of each part."""
    found = storage.file_sizes(url)
    return {
        int(name.rpartition("/")[2].removesuffix(".log")): size
        for name, size in found.items()
        if name.endswith(".log") and not name.rpartition("/")[2].startswith(".")
    }


def _part(url: str, start: int) -> str:
    return storage.join(url, f"{start:016d}.log")
