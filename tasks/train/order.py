"""The order in which training reads rows: a pure function of (rows, seed, step).

A step is one optimizer step and is counted over all epochs. Step s of an epoch takes the rows
[s * G, (s + 1) * G) of the epoch's permutation, G being the global batch size; the last step of an
epoch may hold fewer. How these rows are shared out over ranks and micro-batches never changes
which rows a step sees.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class DataOrder:
    """Which rows each step reads."""

    num_rows: int
    global_batch_size: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the rows."""
        return math.ceil(self.num_rows / self.global_batch_size)

    def rows(self, step: int) -> np.ndarray:
        """Row indices of step `step` (0-based, over all epochs): int64, 1 to G of them."""
        epoch, within = divmod(step, self.steps_per_epoch)
        start = within * self.global_batch_size
        order = _permutation(self.num_rows, self.seed, epoch)
        return order[start : start + self.global_batch_size]


@lru_cache(maxsize=2)
def _permutation(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    """RandomState is used since numpy freezes its streams for ever (NEP 19); Generator's may
    change between versions, and the order is part of a result's identity."""
    return np.random.RandomState([seed, epoch]).permutation(num_rows)


@dataclass(frozen=True)
class Split:
    """How the rows of a step are shared out. Placement: it changes speed, not the result."""

    world_size: int
    micro_batch_size: int
    accumulation: int
    """Micro-batches that each rank runs in one step."""

    def rows(self, step_rows: np.ndarray, rank: int, micro: int) -> np.ndarray:
        """The rows of micro-batch `micro` (0-based) on `rank`; may be none."""
        start = (micro * self.world_size + rank) * self.micro_batch_size
        return step_rows[start : start + self.micro_batch_size]


def choose_split(global_batch_size: int, micro_batch_size: int, world_size: int) -> Split:
    """The split with the largest micro-batch up to `micro_batch_size` that divides the batch.

    When the batch does not divide by the number of ranks at all, the micro-batch is one row and
    some ranks run a dummy batch at the end of each step.
    """
    for micro in range(min(micro_batch_size, global_batch_size), 0, -1):
        if global_batch_size % (micro * world_size) == 0:
            return Split(world_size, micro, global_batch_size // (micro * world_size))
    return Split(world_size, 1, math.ceil(global_batch_size / world_size))
