"""Linear layers with low-rank updates, as the products take them; and several of them as one.

For the mathematics see `lora_linear`. A weight is a plain tensor, a function that makes one (4 or 8
bits, dequantized), or a `Float8Weight`. Weights that lie one under the other in memory are one
matrix (`neighbours`), with all A below them where there is room.

Shape legend: T tokens, I inputs, O outputs, r rank of one projection, R sum of the ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regrow.kernels.dropout import seeded_dropout
from regrow.kernels.float8 import Float8Weight, dequantize
from regrow.kernels.joint_product import COLUMNS, Beside
from regrow.kernels.neighbours import Gap, rows_of_one
from regrow.kernels.nf4 import Nf4Weight, dequantize_below

Base = Tensor | Callable[[], Tensor] | Float8Weight


@dataclass(frozen=True)
class Projection:
    """A linear layer y = x W^T + scaling (x A^T) B^T + bias; without a and b only the base."""

    weight: Base  # [O, I]; a function that makes it, or 8 bits of it, when it is frozen
    a: Tensor | None = None  # [r, I]
    b: Tensor | None = None  # [O, r]
    scaling: float = 1.0
    bias: Tensor | None = None  # [O]
    rounded: Tensor | None = None  # weight in the dtype of x, where its owner keeps it so
    room: Tensor | None = None  # [R, I] right behind the weight, which anyone may write to
    low: tuple[Tensor, Tensor] | None = None  # a and b in the dtype of x, where someone keeps them
    beside: Beside | None = None  # room right beside the weight, for b

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The weight [O, I] as the products take it."""
        if self.rounded is not None and self.rounded.dtype == dtype:
            return self.rounded
        return dense(self.weight, dtype)

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """(a, b) as the products take them; None without an adapter."""
        if self.a is None or self.b is None:
            return None
        if self.low is not None and self.low[0].dtype == dtype:
            return self.low
        return self.a.to(dtype), self.b.to(dtype)

    @property
    def rank(self) -> int:
        return 0 if self.a is None else self.a.shape[0]


@dataclass(frozen=True)
class Rooms:
    """What memory there is next to the frozen weights of layers of one input."""

    below: Tensor | None = None  # [R, I] right behind the last weight
    beside: tuple[Beside, ...] = ()  # of each weight


Drop = tuple[float, int]  # probability and seed of the low-rank path's dropout

ROW_BYTES = 16
"""Rows of a matrix begin at multiples of it, or the GPU's products are slow: ranks that are no
multiple keep their products to themselves."""


def _fills_rows(ranks: int, dtype: torch.dtype) -> bool:
    return ranks * dtype.itemsize % ROW_BYTES == 0


def dropped(x: Tensor, drop: Drop) -> Tensor:
    """x with the same elements dropped whenever it is asked with the same seed."""
    p, seed = drop
    return seeded_dropout(x, p, seed) if p > 0 else x


def dense(weight: Base, dtype: torch.dtype) -> Tensor:
    """The matrix [O, I] itself."""
    if isinstance(weight, Float8Weight):
        return dequantize(weight.rows_OI, weight.row_scales_O).to(dtype)
    return (weight if isinstance(weight, Tensor) else weight()).to(dtype)


# ---- several as one ----


def below(group: Sequence[Projection], dtype: torch.dtype) -> Projection | None:
    """Their weights, one under the other, as one; None where they would have to be copied."""
    weights = held(group)
    if len(group) == 1:
        return Projection(group[0].weight, rounded=group[0].rounded)
    if all(isinstance(weight, Float8Weight) for weight in weights):
        found = Float8Weight.whole_of(weights)
    elif all(isinstance(weight, Nf4Weight) for weight in weights):
        found = dequantize_below(weights, dtype)
    elif all(isinstance(weight, Tensor) and weight.dtype == dtype for weight in weights):
        found = rows_of_one(weights)
    else:
        found = None
    return None if found is None else Projection(found)


def held(group: Sequence[Projection]) -> list[Any]:
    """What the products take of each weight."""
    return [p.weight if p.rounded is None else p.rounded for p in group]


def below_with_adapters(
    group: Sequence[Projection], a_RI: Tensor | None, drop: Drop
) -> Tensor | None:
    """Their weights and all A below them [sum of O + R, I]; None where there is no such room."""
    if a_RI is None or drop[0] or not _fills_rows(len(a_RI), a_RI.dtype):
        return None
    weights = held(group)
    if all(isinstance(weight, Nf4Weight) for weight in weights):
        joint = dequantize_below(weights, a_RI.dtype, len(a_RI))
        joint[-len(a_RI) :] = a_RI
        return joint
    room = group[-1].room
    if room is None or not all(isinstance(weight, Tensor) for weight in weights):
        return None
    joint = rows_of_one([*weights, room[: len(a_RI)]])
    if joint is None or joint.dtype != a_RI.dtype or len(room) < len(a_RI):
        return None
    if a_RI.data_ptr() != room.data_ptr():
        # Not by `joint`, which counts changes with the first weight: what was saved is unchanged.
        room.data[: len(a_RI)] = a_RI
    return joint


def gap_for(group: Sequence[Projection], dtype: torch.dtype) -> Gap | None:
    """Columns for dh behind the dy, if there are any; None where dy need be no neighbours."""
    ranks, room = sum(p.rank for p in group), group[-1].room
    in_4_bits = all(isinstance(p.weight, Nf4Weight) for p in group)
    if torch.compiler.is_compiling() or not (in_4_bits or room is not None):
        return None
    fits = _fills_rows(ranks, dtype) and (room is None or len(room) >= ranks)
    return Gap(ranks if fits else 0)


def room_for(rooms: Rooms | None) -> Gap | None:
    """Columns to leave behind the inputs of layers that have such rooms, where that is of use."""
    if rooms is None or not rooms.beside or torch.compiler.is_compiling():
        return None
    return Gap(COLUMNS)


def check(inputs: int, projection: Projection) -> int:
    """Outputs of the projection (-1 where only its weight's function knows).

    Raises:
        ValueError: when its shapes do not fit together or do not take `inputs` columns.
    """
    weight, a, b = projection.weight, projection.a, projection.b
    shapes = [getattr(part, "shape", None) for part in (weight, a, b)]
    outputs = -1 if shapes[0] is None else shapes[0][0]
    good = shapes[0] is None or shapes[0][1:] == (inputs,)
    good = good and (a is None) == (b is None)
    if good and a is not None and b is not None:
        good = a.shape[1:] == (inputs,) and b.shape[1:] == a.shape[:1]
        good = good and outputs in (-1, b.shape[0])
        outputs = b.shape[0]
    if not good:
        said = ", ".join(str(None if shape is None else tuple(shape)) for shape in shapes)
        raise ValueError(
            "a projection is weight [O, I], a [r, I] and b [O, r] (both or neither), not "
            f"{said} for {inputs} inputs"
        )
    return outputs


# ---- between projections and autograd, which sees a flat list of tensors ----

Constants = tuple[Any, ...]
TENSORS = 4  # of a projection, as `tensors_of` has them


def tensors_of(group: Sequence[Projection]) -> list[Any]:
    """weight (None where it is no plain tensor), a, b, bias of each projection."""
    return [
        tensor
        for p in group
        for tensor in (p.weight if isinstance(p.weight, Tensor) else None, p.a, p.b, p.bias)
    ]


def constants_of(group: Sequence[Projection]) -> tuple[Constants, ...]:
    """What of each projection autograd does not see: a weight that is no plain tensor, and what
    `Projection` names behind the bias."""
    return tuple(
        (
            None if isinstance(p.weight, Tensor) else p.weight,
            p.scaling,
            *(p.rounded, p.room, p.low, p.beside),
        )
        for p in group
    )


def group_of(tensors: Sequence[Any], constants: Sequence[Constants]) -> list[Projection]:
    """The projections again, from `tensors_of` and `constants_of`.

    Where `a` and `b` were not kept (`to_keep`), copies in the products' type stand in their place.
    """
    group = []
    for i, (frozen, scaling, rounded, room, low, beside) in enumerate(constants):
        weight, a, b, bias = tensors[TENSORS * i : TENSORS * (i + 1)]
        whole = weight if frozen is None else frozen
        if a is None and low is not None:
            a, b = low
        group.append(Projection(whole, a, b, scaling, bias, rounded, room, low, beside))
    return group


def keeps_low(group: Sequence[Projection], dtype: torch.dtype) -> bool:
    """Whether someone keeps copies in `dtype` of all adapters there are."""
    lows = [p.low for p in group if p.a is not None]
    return bool(lows) and all(low is not None and low[0].dtype == dtype for low in lows)


def to_keep(
    group: Sequence[Projection], tensors: Sequence[Any], casts: Sequence[Any], dtype: torch.dtype
) -> list[Any]:
    """What autograd keeps of a group for its gradients: `tensors`, or behind `casts` where nobody
    else keeps these.

    Fewer are better: a checkpoint's hooks are called thrice for each.
    """
    if not keeps_low(group, dtype):
        return [*casts, *tensors]
    return [None if i % TENSORS in (1, 2) else tensor for i, tensor in enumerate(tensors)]


def from_kept(
    kept: Sequence[Any], constants: Sequence[Constants]
) -> tuple[list[Any], list[Projection]]:
    """(casts, none where somebody else keeps them; the projections) from what `to_keep` gave."""
    count = TENSORS * len(constants)
    return list(kept[:-count]), group_of(kept[-count:], constants)


def check_residual(residual: Tensor, x: Tensor, outputs: Sequence[int]) -> None:
    """That something is like the only result of x.

    Args:
        outputs: of each projection, as `check` gives them.

    Raises:
        ValueError: where it is not.
    """
    like = residual.shape[:-1] == x.shape[:-1] and residual.dtype == x.dtype
    if len(outputs) != 1 or not like or outputs[0] not in (-1, residual.shape[-1]):
        raise ValueError(
            f"a residual {tuple(residual.shape)} of {residual.dtype} cannot be added to what "
            f"projections with {list(outputs)} outputs make of {tuple(x.shape)}, {x.dtype}"
        )
