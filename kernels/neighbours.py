"""Matrices that lie next to each other in memory, taken for the one matrix that they are parts of.

Products over several layers of one input, dx = dy1 W1 + dy2 W2 + ..., are one product where dy1,
dy2 ... are columns of one matrix and W1, W2 ... lie one under the other: the sum then stays in the
tensor cores instead of being read and written once for each layer. Who makes the parts lays them
so; who takes them looks whether they lie so. Nothing else says it, and nothing breaks without.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Gap:
    """Free columns behind matrices that lie side by side, and who made them: from the layer that
    makes these to whoever takes them (gradients on the way back, inputs on the way there)."""

    columns: int
    _memory: int = 0

    def is_behind(self, made: Tensor) -> None:
        """Columns behind this one's, or its own last ones, are free; those before are the parts."""
        self._memory = _memory(made)

    def behind(self, parts: Sequence[Tensor]) -> Tensor | None:
        """The free columns [T, columns], if these are the parts; once."""
        memory, self._memory = self._memory, 0
        mine = self.columns and memory and _memory(parts[0]) == memory
        joint = columns_of_one(parts) if mine else None
        if joint is None or joint.storage_offset():
            return None
        rows, width = joint.shape
        if joint.stride(0) < width + self.columns:
            return None
        return joint.as_strided((rows, self.columns), joint.stride(), width)


def columns_of_one(parts: Sequence[Tensor]) -> Tensor | None:
    """The matrix [T, sum of O] whose columns are the parts [T, O] in this order; None: no such."""
    first, width = parts[0], sum(part.shape[1] for part in parts)
    step = first.stride(0)
    if width > step or not _follow(parts, first.shape[0], 0, 1):
        return None
    return first.as_strided((first.shape[0], width), (step, 1))


def rows_of_one(parts: Sequence[Tensor]) -> Tensor | None:
    """The matrix [sum of O, I] whose rows are the parts [O, I] in this order; None: no such."""
    first, step = parts[0], parts[0].stride(0)
    if not _follow(parts, first.shape[1], 1, step):
        return None
    return first.as_strided((sum(part.shape[0] for part in parts), first.shape[1]), (step, 1))


def _follow(parts: Sequence[Tensor], common: int, dim: int, step: int) -> bool:
    """Whether each begins `step` elements for each line of the one before it behind that one.

    Args:
        common: the size that all have in dimension `dim`.
    """
    if torch.compiler.is_compiling():
        return False
    first = parts[0]
    memory, strides, at = _memory(first), (first.stride(0), 1), first.storage_offset()
    for part in parts:
        if part.storage_offset() != at or part.stride() != strides or part.dtype != first.dtype:
            return False
        if part.shape[dim] != common or _memory(part) != memory:
            return False
        at += part.shape[1 - dim] * step
    return True


def _memory(x: Tensor) -> int:
    """Which allocation it lies in."""
    return x.untyped_storage()._cdata
