"""A linear layer and its low-rank update as one product, where inputs and weight have room.

Mathematics: y = x W^T + s h B^T + z = [x | h] [W | s B]^T + z, with z a bias, the residual stream
or nothing. The sum is made in the tensor cores, in float32, and rounded once, as in `low_rank_sum`;
but no pass over y is its price. A product of 8192 x 4096 x 4096 takes 0.413 ms and with 64 columns
more 0.419, one of 8192 x 14336 x 4096 1.385 and 1.42; z costs 0.035 (PyTorch copies it first) where
`low_rank_sum` takes 0.075 (H100, sustained, 2026-11-23).

The room is of `COLUMNS`, behind each row of x and of W. Beside W it belongs to the layer for good:
zero, but for the columns of B. Beside x it is lent by whoever made x (`neighbours.Gap`) until the
product is made, and what h leaves of it is set to zero.

Shape legend: T tokens, I inputs, O outputs, r rank of one layer, R sum of the ranks, J `COLUMNS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regrow.kernels.backend import jit, tl, uses_triton
from regrow.kernels.neighbours import columns_of_one

COLUMNS = 64
"""Room beside inputs and weights: the depth of the GEMM's tiles on Hopper. With 16 the products of
`joint_product` took 0.423 and 1.426 ms (as above)."""
_ROWS = 64  # of a program


@dataclass(frozen=True)
class Beside:
    """The room beside the weight of a layer, and what of it is for its B."""

    room: Tensor  # [O, J]
    start: int
    rank: int


# ---- kernel ----


@jit
def _lay_kernel(h, free, rows, rank, h_stride, free_stride, ROWS: tl.constexpr,
                COLUMNS: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    seen = row < rows
    value = tl.load(h + row[:, None] * h_stride + column[None, :],
                    mask=seen[:, None] & (column < rank)[None, :], other=0.0)  # fmt: skip
    tl.store(free + row[:, None] * free_stride + column[None, :], value, mask=seen[:, None])


# ---- host ----


def beside_inputs(x_TI: Tensor, h_TR: Tensor, free_TJ: Tensor) -> Tensor:
    """[x | h | 0], which h is written into."""
    ranks = h_TR.shape[1]
    assert ranks <= COLUMNS == free_TJ.shape[1]
    fits = h_TR.dtype == free_TJ.dtype and h_TR.stride(1) == free_TJ.stride(1) == 1
    if fits and len(h_TR) and uses_triton("joint product", h_TR, free_TJ):
        _lay_kernel[(-(-len(h_TR) // _ROWS),)](
            h_TR, free_TJ, len(h_TR), ranks, h_TR.stride(0), free_TJ.stride(0), _ROWS, COLUMNS
        )
    else:
        free_TJ[:, :ranks] = h_TR
        free_TJ[:, ranks:] = 0
    joint = columns_of_one([x_TI, free_TJ])
    assert joint is not None, "the room is not behind the inputs"
    return joint


def beside_weight(
    weight: object, beside: Beside | None, b_Or: Tensor | None, scaling: float
) -> Tensor | None:
    """[W | s B | 0] [O, I + J], which s B is written into; None where there is no such room."""
    if beside is None or b_Or is None or not isinstance(weight, Tensor):
        return None
    if beside.rank != b_Or.shape[1] or beside.room.dtype != b_Or.dtype:
        return None
    joint = columns_of_one([weight, beside.room])
    if joint is None:
        return None
    # Not by `joint`, which counts changes with the weight: what was saved of it is unchanged.
    place = beside.room.data[:, beside.start : beside.start + beside.rank]
    torch.mul(b_Or, scaling, out=place)
    return joint


def joint_products(
    x_TI: Tensor,
    h_TR: Tensor,
    free_TJ: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    residual_TO: Tensor | None,
) -> list[Tensor]:
    """y [T, O] of each layer.

    Args:
        free_TJ: behind the rows of x.
        weights: of `beside_weight`.
        residual_TO: is added to the only y; then there is no bias.
    """
    x_TK = beside_inputs(x_TI, h_TR, free_TJ)
    if residual_TO is not None:
        (weight,) = weights
        return [torch.addmm(residual_TO, x_TK, weight.t())]
    pairs = zip(weights, biases, strict=True)
    return [torch.nn.functional.linear(x_TK, weight, bias) for weight, bias in pairs]
