"""Ends a worker that hangs: when no step comes for too long, all stacks are written and it exits.

The clock runs in C beside the interpreter (`faulthandler`), so it also ends a process that is stuck
inside a library and holds the interpreter's lock.
"""

from __future__ import annotations

import faulthandler
from pathlib import Path
from typing import Any

from transformers import TrainerCallback


def stacks_name(rank: int) -> str:
    """The file of a rank, in the attempt's directory; empty unless the rank hung."""
    return f"stacks-rank-{rank:05d}.txt"


class Watchdog(TrainerCallback):
    """Started anew at every sign of life."""

    def __init__(self, seconds: float, path: Path) -> None:
        self._seconds = seconds
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w")  # open for as long as the clock runs

    def alive(self, *args: Any, **kwargs: Any) -> None:
        """A sign of life."""
        faulthandler.dump_traceback_later(self._seconds, file=self._file, exit=True)

    on_train_begin = on_step_begin = on_substep_end = on_step_end = on_save = alive
    on_prediction_step = alive

    def close(self) -> None:
        """Stop the clock."""
        faulthandler.cancel_dump_traceback_later()
        self._file.close()
