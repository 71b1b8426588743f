"""At which steps training reports, evaluates and saves: arithmetic on the recipe's settings."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Cadence:
    """How often something is due.

    `steps` is a number of steps, or, below 1, a share of all steps; `per_epoch` a number of times
    in each epoch. `steps` wins; neither means never.
    """

    steps: float | None = None
    per_epoch: int | None = None

    def due(self, total_steps: int, steps_per_epoch: int) -> frozenset[int]:
        """The steps (1-based: a number of finished optimizer steps) at which it is due."""
        if self.steps:
            every = self.steps if self.steps >= 1 else math.ceil(self.steps * total_steps)
            return frozenset(range(int(every), total_steps + 1, int(every)))
        if self.per_epoch:
            interval = steps_per_epoch / self.per_epoch
            count = math.floor(total_steps / interval)
            due = (max(1, round(index * interval)) for index in range(1, count + 1))
            return frozenset(step for step in due if step <= total_steps)
        return frozenset()


def total_steps(steps_per_epoch: int, num_epochs: float, max_steps: int | None) -> int:
    """Optimizer steps of the whole training; `max_steps` overrides the epochs."""
    return max_steps or max(1, math.ceil(steps_per_epoch * num_epochs))


def warmup_steps(total: int, steps: int | None, ratio: float | None) -> int:
    """Steps of warm-up; a number of steps wins over a share of all steps."""
    if steps is not None:
        return steps
    return math.ceil(total * (ratio or 0.0))
