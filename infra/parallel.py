"""Work on many things at once, in threads that stop early when one fails or Ctrl-C comes."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def in_parallel(
    work: Callable[[Any], Any],
    items: Iterable[Any],
    at_once: int,
    stop: threading.Event | None = None,
) -> None:
    """Do `work` on each; `stop` is set when it fails or is interrupted, before waiting for it."""
    pending, stop = list(items), stop or threading.Event()
    if len(pending) == 1:
        work(pending[0])
        return
    with ThreadPoolExecutor(at_once) as pool, set_when_left(stop):
        for _ in pool.map(work, pending):
            pass


@contextlib.contextmanager
def set_when_left(stop: threading.Event) -> Iterator[None]:
    """Set `stop` when the block ends by an error or an interruption."""
    try:
        yield
    except BaseException:
        stop.set()
        raise
