"""Which code made an artifact."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

import manta

HERE = Path(__file__).parent


@functools.cache
def version(*modules: str) -> str:
    """Manta's version and a hash of code: `0.1.0+3f2a…`.

    Args:
        modules: of `workloads/`, by name; none means all of them, and the specs they read.
    """
    files = [HERE / f"{name}.py" for name in modules]
    files = files or [*HERE.glob("*.py"), *HERE.with_name("spec").glob("*.py")]
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return f"{manta.__version__}+{digest.hexdigest()[:12]}"
