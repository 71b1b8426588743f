"""The order in which training reads rows: a pure function of (rows, seed, step).

A step is one optimizer step and is counted over all epochs. Step s of an epoch takes the rows
[s * G, (s + 1) * G) of the epoch's permutation, G being the global batch size; the last step of an
epoch may hold fewer. How these rows are shared out over ranks and micro-batches never changes
which rows a step sees.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

_MOST_STEPS_ALIKE = 50
"""Steps whose rows are sorted by length together (Transformers' LengthGroupedSampler sorts as
many), at most a quarter of an epoch, so that rows still meet different ones in every epoch."""


@dataclass(frozen=True, eq=False)
class DataOrder:
    """Which rows each step reads."""

    num_rows: int
    global_batch_size: int
    seed: int
    kind: str = "mixed"
    """mixed: anew for each epoch; by_length: the same, rows of like length in one step; stored: as
    they lie in the files, in every epoch."""
    lengths: np.ndarray | None = field(default=None, repr=False)
    """[rows] in tokens; only for `by_length`."""

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the rows."""
        return math.ceil(self.num_rows / self.global_batch_size)

    def rows(self, step: int) -> np.ndarray:
        """Row indices of step `step` (0-based, over all epochs): int64, 1 to G of them."""
        epoch, within = divmod(step, self.steps_per_epoch)
        start = within * self.global_batch_size
        return _epoch(self, epoch)[start : start + self.global_batch_size]


@lru_cache(maxsize=2)
def _epoch(order: DataOrder, epoch: int) -> np.ndarray:
    """RandomState is used since numpy freezes its streams for ever (NEP 19); Generator's may
    change between versions, and the order is part of a result's identity."""
    if order.kind == "stored":
        return np.arange(order.num_rows)
    mixed = np.random.RandomState([order.seed, epoch]).permutation(order.num_rows)
    return _grouped(order, mixed, epoch) if order.kind == "by_length" else mixed


def _grouped(order: DataOrder, mixed: np.ndarray, epoch: int) -> np.ndarray:
    """Rows sorted by length within groups of steps, and then the whole steps mixed."""
    assert order.lengths is not None, "rows in order of length need their lengths"
    batch = order.global_batch_size
    alike = batch * max(1, min(_MOST_STEPS_ALIKE, order.steps_per_epoch // 4))
    group = np.arange(len(mixed)) // alike
    # Longest first: a step that is short of rows comes last and holds short ones.
    rows = mixed[np.lexsort((-order.lengths[mixed].astype(np.int64), group))]
    whole = len(rows) // batch
    steps = np.random.RandomState([order.seed, epoch, 1]).permutation(whole)
    return np.concatenate(
        [rows[: whole * batch].reshape(whole, batch)[steps].ravel(), rows[whole * batch :]]
    )


@dataclass(frozen=True)
class Split:
    """How the rows of a step are shared out. Placement: it changes speed, not the result."""

    world_size: int
    micro_batch_size: int
    accumulation: int
    """Micro-batches that each rank runs in one step."""
    costs: np.ndarray | None = field(default=None, compare=False, repr=False)
    """[rows of the split]: how much work each is, in any unit. None: all are taken as equal."""

    def rows(self, step_rows: np.ndarray, rank: int, micro: int) -> np.ndarray:
        """The rows of micro-batch `micro` (0-based) on `rank`; may be none.

        With costs, the ranks' micro-batches of one number cost about the same: ranks wait for each
        other there (FSDP) or at the end of the step.
        """
        together = self.world_size * self.micro_batch_size
        start = micro * together
        if self.costs is None or self.world_size == 1:
            start += rank * self.micro_batch_size
            return step_rows[start : start + self.micro_batch_size]
        costly_first = step_rows[np.argsort(-self.costs[step_rows], kind="stable")]
        # Every other time the ranks change places, or the first would always have the most work.
        place = rank if micro % 2 == 0 else self.world_size - 1 - rank
        return self._shared_out(costly_first[start : start + together])[place]

    def _shared_out(self, rows: np.ndarray) -> list[np.ndarray]:
        """Rows of like cost for each rank: each row, costly ones first, to whoever has the least
        work and room for it (Graham 1969, "Bounds on multiprocessing timing anomalies")."""
        assert self.costs is not None
        shares: list[list[int]] = [[] for _ in range(self.world_size)]
        work = [0.0] * self.world_size
        for number, cost in enumerate(self.costs[rows].tolist()):
            free = [r for r in range(self.world_size) if len(shares[r]) < self.micro_batch_size]
            least = min(free, key=lambda r: work[r])
            shares[least].append(number)
            work[least] += cost
        return [rows[share] for share in shares]


def choose_split(
    global_batch_size: int,
    micro_batch_size: int,
    world_size: int,
    costs: np.ndarray | None = None,
) -> Split:
    """The split with the largest micro-batch up to `micro_batch_size` that divides the batch.

    When the batch does not divide by the number of ranks at all, the micro-batch is one row and
    some ranks run a dummy batch at the end of each step.
    """
    for micro in range(min(micro_batch_size, global_batch_size), 0, -1):
        if global_batch_size % (micro * world_size) == 0:
            return Split(world_size, micro, global_batch_size // (micro * world_size), costs)
    return Split(world_size, 1, math.ceil(global_batch_size / world_size), costs)
