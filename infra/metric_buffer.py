"""Metrics on their way to a server: kept in memory, sent in batches by a thread of their own.

Whoever measures only appends to a list. A server that fails costs one warning and, past a bound,
the oldest points; it never costs the measuring process time or its life.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Point:
    """One value of one metric."""

    name: str
    value: float
    step: int
    time_ms: int
    """Milliseconds since 1970; a point sent twice is told by it."""


class MetricBuffer:
    """Points waiting for `send`.

    Args:
        send: delivers a batch or raises `failures`; called from one thread only. Points of a
            batch that failed are sent again, unchanged.
        failures: the exceptions of `send` that another try can mend.
        every: seconds between batches.
        batch: this many waiting points are sent at once.
        largest: points in one call of `send`.
        bound: points kept while the server fails (100 000 are about 20 MB); then the oldest go.
        retry: seconds between tries while it fails.
    """

    def __init__(
        self,
        send: Callable[[Sequence[Point]], None],
        failures: type[Exception] | tuple[type[Exception], ...],
        *,
        every: float = 2.0,
        batch: int = 100,
        largest: int = 1000,
        bound: int = 100_000,
        retry: float = 10.0,
    ) -> None:
        self._send, self._failures = send, failures
        self._every, self._batch, self._largest, self._retry = every, batch, largest, retry
        self._waiting: deque[Point] = deque()
        self._bound = bound
        self._in_flight = 0
        self._lost = 0
        self._failing = False
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def add(self, metrics: dict[str, float], step: int) -> None:
        """Take metrics of one step; returns at once."""
        now = time.time_ns() // 1_000_000
        points = [Point(name, float(value), step, now) for name, value in metrics.items()]
        with self._changed:
            self._waiting.extend(points)
            self._trim()
            if len(self._waiting) >= self._batch:
                self._changed.notify()

    def close(self, timeout: float = 15.0) -> None:
        """Send what waits, for at most `timeout` seconds, and say how much could not be sent."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout)
        with self._changed:
            lost, self._lost = self._lost + self._in_flight + len(self._waiting), 0
            self._waiting.clear()
        if lost:
            _logger.warning("%d metric values could not be recorded", lost)

    def _trim(self) -> None:
        while len(self._waiting) > self._bound:
            self._waiting.popleft()
            self._lost += 1

    def _run(self) -> None:
        while True:
            with self._changed:
                if self._failing:
                    self._changed.wait_for(lambda: self._closing, self._retry)
                else:
                    self._changed.wait_for(
                        lambda: self._closing or len(self._waiting) >= self._batch, self._every
                    )
                closing = self._closing
            while self._send_some():
                pass
            if closing:
                return

    def _send_some(self) -> bool:
        """Send one batch; whether another waits and can be sent now."""
        with self._changed:
            size = min(len(self._waiting), self._largest)
            points = [self._waiting.popleft() for _ in range(size)]
            self._in_flight = size
        if not points:
            return False
        try:
            self._send(points)
        except self._failures as error:
            self._keep(points, error)
            return False
        self._in_flight = 0
        if self._failing:
            self._failing = False
            _logger.warning("metrics are recorded again")
        return size == self._largest

    def _keep(self, points: list[Point], error: Exception) -> None:
        if not self._failing:
            _logger.warning("metrics are kept in memory until they can be recorded: %s", error)
        self._failing = True
        with self._changed:
            self._in_flight = 0
            self._waiting.extendleft(reversed(points))
            self._trim()
