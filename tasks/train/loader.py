"""Reads the rows of each micro-batch and puts them on the way to the device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from regrow.tasks.modeling.batches import PackedRow, flatten
from regrow.tasks.modeling.context_slices import slice_batch, tokens_multiple
from regrow.tasks.train.order import Split

TOKENS, SUPERVISED = "num_tokens", "num_supervised"
"""Counts a batch carries beside the model's inputs; the loop takes them out."""
ROW_LENGTHS = "row_lengths"
"""Tokens of each of its rows, without padding; the loss of training takes them out."""


CUDA_MULTIPLE = 64
"""Tokens of a micro-batch are padded to a multiple of it on CUDA: at totals that are no multiple of
8 cuBLAS took its unaligned kernels, 42 of 495 ms of a step (H100, Llama-3.1-8B's shape, LoRA,
2026-11-21); 64 is the depth of a tile of its fast ones."""


class Rows(Protocol):
    """A split of the prepared artifact."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> PackedRow: ...
    def position(self, index: int) -> tuple[int, int]: ...


class Order(Protocol):
    """Which rows a step reads."""

    def rows(self, step: int) -> np.ndarray: ...


@dataclass(frozen=True)
class FileOrder:
    """Rows as they lie in the files, each once: the order of a validation."""

    num_rows: int
    rows_per_step: int

    @property
    def steps(self) -> int:
        """Steps that cover all rows."""
        return math.ceil(self.num_rows / self.rows_per_step)

    def rows(self, step: int) -> np.ndarray:
        """Row indices of a step: int64, 1 to `rows_per_step` of them."""
        start = step * self.rows_per_step
        return np.arange(start, min(start + self.rows_per_step, self.num_rows))


class MicroBatches(Dataset[dict[str, Any]]):
    """All micro-batches of one rank, numbered through all steps (and so through all epochs).

    The number alone says which rows a micro-batch holds: any of them can be read without those
    before it, which is what makes resuming exact and free.

    Args:
        steps: of the whole training.
        rank: of this one among those that read different rows.
        pad_to: tokens of each row, or None; `multiple_of` then pads the micro-batch.
        start: steps done already; index 0 is the first micro-batch after them.
        context: (rank, number) among the processes that share each row.
        counts: whether tokens are counted here; not so where another process reads the same.
    """

    def __init__(
        self,
        rows: Rows,
        order: Order,
        split: Split,
        rank: int,
        steps: int,
        pad_to: int | None,
        start: int = 0,
        multiple_of: int = 1,
        context: tuple[int, int] = (0, 1),
        counts: bool = True,
    ) -> None:
        self._context, self._counts = context, counts
        if context[1] > 1:
            multiple_of = tokens_multiple(context[1], multiple_of)
        self._rows, self._order, self._split, self._rank = rows, order, split, rank
        self._length, self.start = (steps - start) * split.accumulation, start
        self._pad_to = None
        if pad_to is not None:
            whole = pad_to * split.micro_batch_size
            self._pad_to = whole + -whole % multiple_of
        self._multiple_of = multiple_of

    def __len__(self) -> int:
        return self._length

    def indices(self, step: int, micro: int) -> list[int]:
        """The rows of a micro-batch of this rank, by step (0-based, over all) and number in it."""
        return [int(r) for r in self._split.rows(self._order.rows(step), self._rank, micro)]

    def rows_in_step(self, step: int) -> int:
        """Rows of a step (0-based, over all), on all ranks."""
        return len(self._order.rows(step))

    def row(self, index: int) -> PackedRow:
        """A row of the split."""
        return self._rows[index]

    def position(self, index: int) -> tuple[int, int]:
        """(shard, row in it) of a row of the split."""
        return self._rows.position(index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        step, micro = divmod(index, self._split.accumulation)
        rows = [self._rows[row] for row in self.indices(self.start + step, micro)]
        batch = flatten(rows, self._pad_to, multiple_of=self._multiple_of)
        rank, processes = self._context
        if processes > 1:
            batch = slice_batch(batch, rank, processes)
        counted = rows if self._counts else []
        return batch | {
            TOKENS: sum(len(row.input_ids) for row in counted),
            SUPERVISED: sum(int(row.loss_mask.sum()) for row in counted),
            ROW_LENGTHS: tuple(len(row.input_ids) for row in rows),
        }


def make_loader(batches: MicroBatches, workers: int, pin_memory: bool) -> DataLoader[Any]:
    """The micro-batches in order, one at a time.

    The loader has a random generator of its own, since it draws a number from the global one at
    each start otherwise, and an evaluation would then change the dropout that follows.
    """
    return DataLoader(
        batches,
        batch_size=1,
        collate_fn=_only,
        num_workers=workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),
    )


def _only(batches: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A "batch" of the loader is one micro-batch, which is a batch already."""
    (batch,) = batches
    return batch
