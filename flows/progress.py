"""A running stage's progress as lines in the terminal: how far, how fast, how long still."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

from regrow.flows.interruption import look
from regrow.infra.secrets import mask_secrets

_EVERY_SECONDS = 2.0  # often enough to see life, seldom enough to keep a log readable


def say(line: str, out: TextIO | None = None) -> None:
    """Write one line at once, without secrets."""
    print(mask_secrets(line), file=out or sys.stdout, flush=True)


def duration(seconds: float) -> str:
    """Seconds for people: "8.2 s", "3 min 05 s", "2 h 10 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


Listener = Callable[[float, float | None, str, str], None]
"""Hears what `Reporter.progress` is told."""


class LineReporter:
    """`Reporter` that prints `[stage] 512/2048 rows  25 %  310 rows/s  5 s left`.

    Args:
        title: the stage, in front of each line.
        emit: gets each line; default: standard output.
        listener: hears of all progress too.
    """

    def __init__(
        self, title: str, emit: Callable[[str], None] = say, listener: Listener | None = None
    ) -> None:
        self._title, self._emit, self._listener = title, emit, listener
        self._unit, self._begin, self._last = "", 0.0, 0.0

    def log(self, message: str) -> None:
        """One line for people; here and in `progress`, a signal that was swallowed comes again."""
        look()
        for line in message.splitlines():
            self._emit(f"[{self._title}] {line}")

    def progress(self, done: float, total: float | None, unit: str, note: str = "") -> None:
        """Print at most every two seconds, and always at the end."""
        look()
        if self._listener is not None:
            self._listener(done, total, unit, note)
        now = time.monotonic()
        if unit != self._unit:
            self._unit, self._begin, self._last = unit, now, 0.0
        if now - self._last < _EVERY_SECONDS and done != total:
            return
        self._last = now
        self.log(
            f"{_amount(done, total, unit)}{_rate(done, total, unit, now - self._begin)} {note}"
        )


def _amount(done: float, total: float | None, unit: str) -> str:
    if not total:
        return f"{done:,.0f} {unit}"
    return f"{done:,.0f}/{total:,.0f} {unit}  {100 * done / total:.0f} %"


def _rate(done: float, total: float | None, unit: str, seconds: float) -> str:
    if seconds <= 0 or done <= 0:
        return ""
    rate = done / seconds
    left = f"  {duration((total - done) / rate)} left" if total and total > done else ""
    return f"  {rate:,.1f} {unit}/s{left}"
