"""Adds a low-rank product and another matrix to a matrix, in one pass over them.

Mathematics: y = x + s h B^T + z; x is what the frozen weight of a layer gives, z the residual
stream. All sums in float32, rounded once.

The order matters. A stream is a number of 16 bits, whose steps are often larger than an adapter's
update: stream + update alone, rounded, is the stream again. Together with x, whose steps are finer,
the update shifts what is rounded. In bfloat16, with a stream of rms 4 and x of rms 0.3, this share
of an update of rms 1e-3 or 1e-2 is in y (by regression; tests/kernels/test_low_rank_sum.py): 1.04
and 1.00, where the stream begun with the update keeps 0.16 and 0.89 of them. Below the steps of x
ties decide, so that less comes as more (3e-4: 1.8); the error of y is the smallest of all orders.

Without z, 8192 x 4096, r = 16: 0.052 ms, where h B^T alone takes 0.032 and the sum 0.072
(tests/bench/gated_tiles.py, H100, 2026-11-22); with z a pass more, which is not measured.

Shape legend: T tokens, O outputs, r rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regrow.kernels.backend import INTERPRETING, custom_op, jit, tl, uses_triton
from regrow.kernels.rank_gradients import padded

LARGEST_RANK = 64  # beyond it a tile's factors weigh as much as the tile
_ROWS, _COLUMNS, _WARPS = 32, 128, 4  # the best of six by 0 to 20 %


# ---- reference ----


def reference(x_TO: Tensor, h_Tr: Tensor, b_Or: Tensor, scale: float, z_TO: Tensor) -> Tensor:
    """y by the formula, in float32 at least."""
    exact = torch.promote_types(x_TO.dtype, torch.float32)
    y_TO = torch.addmm(x_TO.to(exact), h_Tr.to(exact), b_Or.to(exact).t(), alpha=scale)
    return (y_TO + z_TO).to(x_TO.dtype)


# ---- kernel ----


@jit
def _low_rank_sum_kernel(x, h, b, z, y, rows, columns, rank, scale, x_stride, h_stride, z_stride,
                         DEPTH: tl.constexpr, ROWS: tl.constexpr,
                         COLUMNS: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    r = tl.arange(0, DEPTH)
    in_rows = row < rows
    in_columns = column < columns
    seen = in_rows[:, None] & in_columns[None, :]
    h_tile = tl.load(h + row[:, None] * h_stride + r[None, :],
                     mask=in_rows[:, None] & (r < rank)[None, :], other=0.0)  # fmt: skip
    b_tile = tl.load(b + column[None, :] * rank + r[:, None],
                     mask=(r < rank)[:, None] & in_columns[None, :], other=0.0)  # fmt: skip
    value = tl.load(x + row[:, None] * x_stride + column[None, :], mask=seen, other=0.0)
    value = value.to(tl.float32) + scale * tl.dot(h_tile, b_tile)
    more = tl.load(z + row[:, None] * z_stride + column[None, :], mask=seen, other=0.0)
    value += more.to(tl.float32)
    tl.store(y + row[:, None] * columns + column[None, :], value, mask=seen)


# ---- host ----


def _fake_sum(x_TO, h_Tr, b_Or, scale, z_TO):
    return x_TO.new_empty(x_TO.shape)


@custom_op(
    "low_rank_sum",
    "(Tensor x, Tensor h, Tensor b, float scale, Tensor z) -> Tensor",
    _fake_sum,
)
def low_rank_sum(x_TO: Tensor, h_Tr: Tensor, b_Or: Tensor, scale: float, z_TO: Tensor) -> Tensor:
    """x + s h B^T + z [T, O], contiguous, in the dtype of x; no gradient."""
    if not takes_sum(h_Tr, b_Or, z_TO, x_TO):
        return reference(x_TO, h_Tr, b_Or, scale, z_TO).contiguous()
    rows, columns = x_TO.shape
    rank = h_Tr.shape[1]
    y_TO = x_TO.new_empty(rows, columns)
    _low_rank_sum_kernel[(-(-rows // _ROWS), -(-columns // _COLUMNS))](
        x_TO, h_Tr, b_Or, z_TO, y_TO, rows, columns, rank, scale, x_TO.stride(0), h_Tr.stride(0),
        z_TO.stride(0), padded(rank), _ROWS, _COLUMNS, num_warps=_WARPS,
    )  # fmt: skip
    return y_TO


def takes_sum(h: Tensor, b: Tensor, *added: Tensor) -> bool:
    """Whether the kernel runs: 16 bits, rows without gaps, a small rank."""
    given = h, b, *added
    half = h.dtype == torch.float16 or (h.dtype == torch.bfloat16 and not INTERPRETING)
    return (
        half  # the interpreter's product takes the bits of bfloat16 for whole numbers
        and all(t.stride(1) == 1 and t.dtype == h.dtype for t in given)
        and b.is_contiguous()
        and 0 < h.shape[1] <= LARGEST_RANK
        and len(h) > 0
        and uses_triton("low rank sum", *given)
    )
