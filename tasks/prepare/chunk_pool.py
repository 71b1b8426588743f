"""Chunks encoded by other processes, a bounded number at a time; units built by threads."""

from __future__ import annotations

import contextlib
import contextvars
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import (
    FIRST_EXCEPTION,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from multiprocessing import get_context, parent_process
from typing import Any, TypeVar

from regrow.tasks.prepare.tokenize import Block, ChunkTask, encode_chunk

In = TypeVar("In")
Out = TypeVar("Out")


class Stopped(Exception):  # noqa: N818 - nobody sees it
    """The work is given up because other work has failed."""


def _end_with_parent() -> None:
    """A process of the pool would wait for ever for the next chunk of a parent that was killed."""
    threading.Thread(target=_watch_parent, daemon=True).start()


def _watch_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextlib.contextmanager
def _interrupts_are_ours() -> Iterator[None]:
    """Processes started inside do not hear Ctrl-C, which a terminal sends to all of a group.

    They would die of it with a traceback each, in the middle of their imports even. The signal mask
    is inherited from the first instruction on, and any thread may set its own.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class ChunkPool:
    """Processes that encode chunks for any number of threads. A context manager.

    What is in work or waits to be taken is bounded whatever the amount of work, and so is memory:
    two chunks for each process, and one more.
    """

    def __init__(self, processes: int) -> None:
        # spawn: a forked child of a process with threads (Prefect, Arrow) may hang.
        self._pool = ProcessPoolExecutor(
            processes, mp_context=get_context("spawn"), initializer=_end_with_parent
        )
        self._free = threading.Semaphore(2 * processes + 1)
        self.stop = threading.Event()
        """Set it and whoever takes blocks gets `Stopped`."""

    def __enter__(self) -> ChunkPool:
        return self

    def __exit__(self, *exception: Any) -> None:
        self._pool.shutdown(cancel_futures=True)

    def encoded(self, tasks: Sequence[ChunkTask]) -> Iterator[Block]:
        """The tasks' blocks in order."""
        waiting: deque[Future[Block]] = deque()
        try:
            for task in tasks:
                # Whoever holds a place waits for its own block first, so that all go on.
                while not self._free.acquire(blocking=not waiting):
                    yield self._taken(waiting)
                waiting.append(self._started(task))
            while waiting:
                yield self._taken(waiting)
        finally:
            for future in waiting:
                future.cancel()
                self._free.release()

    def _started(self, task: ChunkTask) -> Future[Block]:
        try:
            if self.stop.is_set():
                raise Stopped
            with _interrupts_are_ours():
                return self._pool.submit(encode_chunk, task)
        except BaseException:
            self._free.release()
            raise

    def _taken(self, waiting: deque[Future[Block]]) -> Block:
        block = waiting[0].result()
        if self.stop.is_set():
            raise Stopped
        waiting.popleft()
        self._free.release()
        return block


class Locks:
    """A lock for each name."""

    def __init__(self) -> None:
        self._locks: dict[str, threading.Lock] = {}

    def of(self, name: str) -> threading.Lock:
        """The lock of that name."""
        return self._locks.setdefault(name, threading.Lock())


def all_of(
    work: Callable[[In], Out], items: Sequence[In], threads: int, stop: threading.Event
) -> list[Out]:
    """What `work` makes of each item, in their order, by several threads.

    When one fails `stop` is set, and the first failure in the order of the items is raised once all
    threads have ended.
    """
    with ThreadPoolExecutor(threads) as executor:
        futures = [executor.submit(contextvars.copy_context().run, work, item) for item in items]
        failed = True  # also when this thread is interrupted
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            failed = any(future.exception() for future in done)
        finally:
            if failed:
                stop.set()
                executor.shutdown(wait=True, cancel_futures=True)
    errors = (future.exception() for future in futures if not future.cancelled())
    error = next((e for e in errors if e is not None and not isinstance(e, Stopped)), None)
    if error is not None:
        raise error
    return [future.result() for future in futures]
