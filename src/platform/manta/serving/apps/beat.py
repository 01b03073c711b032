"""Something said again and again while a block runs, so that others know that it still does."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

from manta.errors import MantaError


@contextlib.contextmanager
def beating(say: Callable[[], object], every_s: float, patience_s: float) -> Iterator[None]:
    """Call `say` every `every_s` seconds in a thread, until the block ends.

    A storage that is away for a while, a MantaError of `say`, is passed over: it is said again,
    and who no longer hears it draws the conclusion.

    Args:
        patience_s: how long the end of the block waits for a `say` that has begun.
    """
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(every_s):
            with contextlib.suppress(MantaError):
                say()

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=patience_s)
