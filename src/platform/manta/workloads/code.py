"""Which code made an artifact."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

import manta


@functools.cache
def version() -> str:
    """Manta's version and a hash of the modules that shape artifacts: `0.1.0+3f2a…`."""
    package = Path(manta.__file__).parent
    digest = hashlib.sha256()
    for folder in ("spec", "workloads"):
        for file in sorted((package / folder).glob("*.py")):
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return f"{manta.__version__}+{digest.hexdigest()[:12]}"
