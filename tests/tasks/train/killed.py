"""A training in the test's own process that ends right after a step, as a kill would end it."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback


class Killed(BaseException):
    """Not an Exception: nothing on the way may handle it."""


class KillAt(TrainerCallback):
    """Ends the training right after an optimizer step, before it is reported or saved."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raises Killed after that step."""
        if state.global_step == self.step:
            raise Killed
