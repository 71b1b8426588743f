"""Takes some rows of a matrix, each once; the gradient is copied back into zeros, not added.

Mathematics: y_i = x_{r_i} with all r_i different; so dx_{r_i} = dy_i, and 0 in all other rows.
PyTorch's own backward pass must expect a row to be taken twice and adds with atomic operations.

Shape legend: T rows, n of them taken, H hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

# ---- reference ----


def reference(x_1TH: Tensor, rows_n: Tensor) -> Tensor:
    """The rows [1, n, H], by PyTorch's indexing."""
    return x_1TH[:, rows_n]


# ---- autograd ----


class _TakenRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TH, rows_n):
        ctx.save_for_backward(rows_n)
        ctx.rows = len(x_TH)
        return x_TH.index_select(0, rows_n)

    @staticmethod
    def backward(ctx, *grad_outputs):
        (dy_nH,) = grad_outputs
        (rows_n,) = ctx.saved_tensors
        dx_TH = dy_nH.new_zeros(ctx.rows, dy_nH.shape[1])
        return dx_TH.index_copy_(0, rows_n, dy_nH), None


# ---- public ----


def taken_rows(x_1TH: Tensor, rows_n: Tensor) -> Tensor:
    """The rows [1, n, H] of x [1, T, H].

    Args:
        rows_n: int64, all different.

    Raises:
        ValueError: when x is not one matrix.
    """
    if x_1TH.ndim != 3 or x_1TH.shape[0] != 1:
        raise ValueError(f"taken_rows takes x [1, T, H], not {tuple(x_1TH.shape)}")
    return _TakenRows.apply(x_1TH.squeeze(0), rows_n).unsqueeze(0)
