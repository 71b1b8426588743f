"""Stopping early and cleanly: SIGTERM or a deadline, agreed by all ranks at the same step."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from regrow.tasks.train.saving import Ranks

EXIT_CODE = 75
"""Of a worker that was stopped and can go on: EX_TEMPFAIL of sysexits.h, "try again later"."""

# What ranks tell each other; the larger wins.
_GO_ON, _SIGNAL, _DEADLINE = range(3)
_REASONS = {_SIGNAL: "signal", _DEADLINE: "deadline"}


class StopEarly(TrainerCallback):
    """Ends training after the step in which any rank was asked to stop, with a checkpoint."""

    def __init__(self, ranks: Ranks, deadline: float | None, saves: bool) -> None:
        """
        Args:
            deadline: on the clock of `time.monotonic`; None: none.
            saves: whether checkpoints are kept at all.
        """
        self._ranks, self._deadline, self._saves = ranks, deadline, saves
        self._wish = _GO_ON
        self.reason: str | None = None
        """Why training ended before its last step: "signal" or "deadline"; None when it did not."""

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, SIGTERM asks to stop after the step instead of ending the process."""
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may set handlers
            return
        before = signal.signal(signal.SIGTERM, self._hear)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._wish = max(self._wish, _SIGNAL)

    def on_step_end(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> TrainerControl:
        """Agree with the other ranks whether this step is the last."""
        if self._deadline is not None and time.monotonic() >= self._deadline:
            self._wish = _DEADLINE
        wish = self._agreed()
        if wish != _GO_ON and state.global_step < state.max_steps:
            self.reason = _REASONS[wish]
            control.should_save = self._saves
            control.should_training_stop = True
        return control

    def _agreed(self) -> int:
        """The largest wish of all ranks: one small message on the CPU, beside the GPU's work."""
        if self._ranks.control is None:
            return self._wish
        wish = torch.tensor(self._wish)
        torch.distributed.all_reduce(
            wish, torch.distributed.ReduceOp.MAX, group=self._ranks.control
        )
        return int(wish)
