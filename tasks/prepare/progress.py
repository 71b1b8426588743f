"""How far the stage is, in rows or tokens, and how fast tokens come."""

from __future__ import annotations

import time

from regrow.tasks.stage import Reporter


class Progress:
    """Adds up what is told in small amounts; the note says how fast tokens come."""

    def __init__(self, report: Reporter, total: int, unit: str, note: str) -> None:
        self._report, self._total, self._unit, self._note = report, total, unit, note
        self._done = self._tokens = 0
        self._begin = time.monotonic()

    def __call__(self, more: int, tokens: int = 0) -> None:
        """So many more are done, and so many tokens were made or found on the way."""
        self._done += more
        self._tokens += tokens
        self._report.progress(min(self._done, self._total), self._total, self._unit, self.note)

    @property
    def note(self) -> str:
        """Such as "tokenized, 1.2 M tokens, 610 k tokens/s"."""
        if not self._tokens:
            return self._note
        rate = self._tokens / max(time.monotonic() - self._begin, 1e-9)
        return f"{self._note}, {short(self._tokens)} tokens, {short(rate)} tokens/s"


def short(count: float) -> str:
    """1234567 as "1.2 M"."""
    for size, name in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if count >= size:
            return f"{count / size:.1f}{name}"
    return f"{count:.0f}"
