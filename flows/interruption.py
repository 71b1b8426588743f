"""Ctrl-C and SIGTERM are remembered, and raised again where somebody swallowed them.

Python raises what a signal asks for at whatever line the main thread is. Where that is inside a
callback of a weak reference, a `__del__`, or a library's bare `except`, it is printed or dropped,
and the run would go on to its end. So each signal's number also goes into a pipe
(`signal.set_wakeup_fd`, which leaves the handlers alone: Prefect tells a cancellation from a crash
by its own), and safe points look whether one came that is not on its way up.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_STOPS = (signal.SIGINT, signal.SIGTERM)
_MOST_BYTES = 4096  # one a signal


class _Memory:
    """The reading end of the pipe, and which signal came through it; numbers as the system has."""

    reader: int | None = None
    asked: int | None = None


_memory = _Memory()


@contextmanager
def remembered() -> Iterator[None]:
    """Inside, `look` knows which signals came; within another such block this one does nothing.

    Other threads than the main one get no signals, and where somebody else (an event loop) reads
    the numbers they keep them: in both cases `look` knows of none.
    """
    if _memory.reader is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    for end in (reader, writer):
        os.set_blocking(end, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    if before >= 0:
        signal.set_wakeup_fd(before)
    _memory.reader, _memory.asked = reader, None
    try:
        yield
    finally:
        _memory.reader = None
        signal.set_wakeup_fd(before)
        os.close(reader)
        os.close(writer)


def _forget() -> None:
    """In a forked child, whose signals (a pool that ends its workers) are none of its parent's."""
    if _memory.reader is not None:
        _memory.reader = None
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_forget)


def look() -> None:
    """Do again what a signal's handler did, if that was swallowed; only in the main thread.

    Raises:
        whatever the handler raises: KeyboardInterrupt, or Prefect's TerminationSignal.
    """
    if _memory.reader is None or threading.current_thread() is not threading.main_thread():
        return
    with suppress(BlockingIOError):
        came = [n for n in os.read(_memory.reader, _MOST_BYTES) if n in _STOPS]
        _memory.asked = came[-1] if came else _memory.asked
    if _memory.asked is None or _on_its_way():
        return
    handler = signal.getsignal(_memory.asked)
    if callable(handler):
        handler(_memory.asked, None)


def _on_its_way() -> bool:
    """Whether an exception that is no error is being handled now, or led to what is."""
    error = sys.exc_info()[1]
    while error is not None:
        if not isinstance(error, Exception):
            return True
        error = error.__context__
    return False
