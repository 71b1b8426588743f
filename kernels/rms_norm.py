"""RMS normalisation, with the residual addition before it in the same pass.

Mathematics (Zhang and Sennrich 2019, arXiv 1910.07467), a row x of size H:
    x = x + residual            (when there is one)
    n = x / sqrt(mean(x^2) + eps)          y = n * (weight + offset)
    dx = r * (g - n mean(g n)) + dsum      with g = dy * (weight + offset), r = 1 / sqrt(...)
    dweight = sum over rows of dy * n
where dsum is the gradient of x (or of the sum) from elsewhere: where a layer's input goes on beside
its norm, autograd would add the two in a pass of its own (three of [T, H] where there is one here).
offset is 0 for Llama and 1 for Gemma, which stores weight - 1. Everything is computed in float32
and rounded once (Hugging Face's Llama rounds n before it multiplies by the weight).
Saved are x and one float per row; y is not.

Shape legend: H hidden size, P programs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regrow.kernels.backend import (
    custom_op,
    jit,
    multiprocessors,
    next_power_of_2,
    tl,
    uses_triton,
)
from regrow.kernels.neighbours import Gap

_PROGRAMS_PER_MULTIPROCESSOR = 4  # of the backward pass: enough loads in flight (kernels/bench)
_LARGEST_ROW = 32768  # elements a program holds in registers


# ---- reference ----


def reference(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None = None,
    offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(y, x + residual) by the formula, rounded to the dtype of x at the end."""
    total = x if residual is None else x + residual
    wide = total.to(torch.promote_types(x.dtype, torch.float32))
    n = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (n * (weight.to(wide.dtype) + offset)).to(x.dtype), total


# ---- kernels ----


@jit
def _rms_norm_forward_kernel(x, residual, weight, y, y_stride, total, rstd, width, eps, offset,
                             HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    seen = column < width
    place = row * width + column
    value = tl.load(x + place, mask=seen, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        value += tl.load(residual + place, mask=seen, other=0.0).to(tl.float32)
        value = value.to(total.dtype.element_ty)  # the norm sees the sum that is kept
        tl.store(total + place, value, mask=seen)
        value = value.to(tl.float32)
    r = tl.rsqrt(tl.sum(value * value, 0) / width + eps)
    w = tl.load(weight + column, mask=seen, other=0.0).to(tl.float32) + offset
    tl.store(rstd + row, r)
    tl.store(y + row * y_stride + column, value * r * w, mask=seen)


@jit
def _rms_norm_backward_kernel(dy, dtotal, total, weight, rstd, dx, dweight, rows, width, offset,
                              HAS_DTOTAL: tl.constexpr, HAS_DWEIGHT: tl.constexpr,
                              BLOCK: tl.constexpr):  # fmt: skip
    """Program p takes rows p, p + P, ...: the order of the sums does not depend on the clock."""
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    seen = column < width
    w = tl.load(weight + column, mask=seen, other=0.0).to(tl.float32) + offset
    summed = tl.zeros([BLOCK], tl.float32)
    for row in range(program, rows, tl.num_programs(0)):
        place = tl.cast(row, tl.int64) * width + column
        d = tl.load(dy + place, mask=seen, other=0.0).to(tl.float32)
        r = tl.load(rstd + row)
        n = tl.load(total + place, mask=seen, other=0.0).to(tl.float32) * r
        g = d * w
        grad = r * (g - n * (tl.sum(g * n, 0) / width))
        if HAS_DTOTAL:
            grad += tl.load(dtotal + place, mask=seen, other=0.0).to(tl.float32)
        if HAS_DWEIGHT:
            summed += d * n
        tl.store(dx + place, grad, mask=seen)
    if HAS_DWEIGHT:
        tl.store(dweight + program * width + column, summed, mask=seen)


# ---- host ----


def _with_room(like: Tensor, room: int) -> Tensor:
    """[..., H], with so many numbers behind each row."""
    if not room:
        return torch.empty_like(like)  # no view, which nobody may change in place
    *sizes, width = like.shape
    return like.new_empty(*sizes, width + room)[..., :width]


def _warps(block: int) -> int:
    return max(1, min(16, block // 512))


def _fake_forward(x, residual, weight, eps, offset, room):
    total = x.new_empty(0) if residual is None else torch.empty_like(x)
    return _with_room(x, room), total, x.new_empty(x.shape[:-1], dtype=torch.float32)


@custom_op(
    "rms_norm_forward",
    "(Tensor x, Tensor? residual, Tensor weight, float eps, float offset, int room)"
    " -> (Tensor, Tensor, Tensor)",
    _fake_forward,
)
def _forward(
    x: Tensor, residual: Tensor | None, weight_H: Tensor, eps: float, offset: float, room: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, x + residual or [0], 1 / root mean square per row), of contiguous [..., H].

    Args:
        room: so many numbers behind each row of y are free.
    """
    width = x.shape[-1]
    y = _with_room(x, room)
    total = x.new_empty(0) if residual is None else torch.empty_like(x)
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    block = next_power_of_2(width)
    if x.numel():
        _rms_norm_forward_kernel[(rstd.numel(),)](
            x, x if residual is None else residual, weight_H, y, width + room, total, rstd, width,
            eps, offset, residual is not None, block, num_warps=_warps(block),
        )  # fmt: skip
    return y, total, rstd


def _fake_backward(dy, dtotal, total, weight, rstd, offset, wants_weight):
    return torch.empty_like(total), weight.new_empty(weight.shape[0] if wants_weight else 0)


@custom_op(
    "rms_norm_backward",
    "(Tensor dy, Tensor? dtotal, Tensor total, Tensor weight, Tensor rstd, float offset, "
    "bool wants_weight) -> (Tensor, Tensor)",
    _fake_backward,
)
def _backward(
    dy: Tensor,
    dtotal: Tensor | None,
    total: Tensor,
    weight_H: Tensor,
    rstd: Tensor,
    offset: float,
    wants_weight: bool,
) -> tuple[Tensor, Tensor]:
    """(dx, dweight or [0])."""
    rows, width = rstd.numel(), total.shape[-1]
    programs = min(rows, _PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(total.device))
    dx = torch.empty_like(total)
    partial_PH = total.new_empty(programs if wants_weight else 0, width, dtype=torch.float32)
    block = next_power_of_2(width)
    if rows:
        _rms_norm_backward_kernel[(programs,)](
            dy, dy if dtotal is None else dtotal, total, weight_H, rstd, dx, partial_PH, rows,
            width, offset, dtotal is not None, wants_weight, block, num_warps=_warps(block),
        )  # fmt: skip
    return dx, partial_PH.sum(0).to(weight_H.dtype) if wants_weight else weight_H.new_empty(0)


# ---- autograd ----


def _normed(
    ctx: Any, x: Tensor, weight_H: Tensor, eps: float, offset: float, room: int = 0
) -> Tensor:
    """The norm of contiguous x; what its gradients need is kept."""
    y, _, rstd = _forward(x, None, weight_H, eps, offset, room)
    ctx.save_for_backward(x, weight_H, rstd)
    ctx.offset = offset
    return y


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight_H, eps, offset):
        return _normed(ctx, x.contiguous(), weight_H, eps, offset)

    @staticmethod
    def backward(ctx, *grad_outputs):
        (dy,) = grad_outputs
        wants = ctx.needs_input_grad[1]
        dx, dweight = _backward(dy.contiguous(), None, *ctx.saved_tensors, ctx.offset, wants)
        return dx, dweight if wants else None, None, None


class _RMSNormBeside(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight_H, eps, offset, behind):
        x = x.contiguous()
        ctx.set_materialize_grads(False)
        y = _normed(ctx, x, weight_H, eps, offset, behind.columns if behind else 0)
        if behind is not None:
            behind.is_behind(y)
        return y, x

    @staticmethod
    def backward(ctx, *grad_outputs):
        dy, dx = grad_outputs
        if dy is None:
            return dx, *(None,) * 4
        wants = ctx.needs_input_grad[1]
        dx = None if dx is None else dx.contiguous()
        dx, dweight = _backward(dy.contiguous(), dx, *ctx.saved_tensors, ctx.offset, wants)
        return dx, dweight if wants else None, *(None,) * 3


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight_H, eps, offset):
        x, residual = x.contiguous(), residual.contiguous()
        y, total, rstd = _forward(x, residual, weight_H, eps, offset, 0)
        ctx.save_for_backward(total, weight_H, rstd)
        ctx.offset = offset
        return y, total

    @staticmethod
    def backward(ctx, *grad_outputs):
        dy, dtotal = grad_outputs
        wants = ctx.needs_input_grad[2]
        dx, dweight = _backward(
            dy.contiguous(), dtotal.contiguous(), *ctx.saved_tensors, ctx.offset, wants
        )
        return dx, dx, dweight if wants else None, None, None


# ---- public ----


def rms_norm(x: Tensor, weight_H: Tensor, eps: float, *, offset: float = 0.0) -> Tensor:
    """x [..., H] divided by its root mean square, times (weight + offset); in the dtype of x.

    Raises:
        ValueError: when the weight does not fit.
    """
    _check(x, weight_H)
    if not _fits(x, weight_H):
        return reference(x, weight_H, eps, offset=offset)[0]
    return _RMSNorm.apply(x, weight_H, eps, offset)


def rms_norm_beside(
    x: Tensor, weight_H: Tensor, eps: float, *, offset: float = 0.0, behind: Gap | None = None
) -> tuple[Tensor, Tensor]:
    """(norm of x, x), for an x [..., H] that goes on: its two gradients are added in one pass.

    Args:
        behind: room that may be left behind each row of the norm.

    Raises:
        ValueError: when the weight does not fit.
    """
    _check(x, weight_H)
    if not _fits(x, weight_H):
        return reference(x, weight_H, eps, offset=offset)[0], x
    return _RMSNormBeside.apply(x, weight_H, eps, offset, behind)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight_H: Tensor, eps: float, *, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(norm of x + residual, x + residual), both shaped like x [..., H].

    x and residual are two tensors: given one twice, torch.compile of 2.11 loses half the gradient
    of any custom function (2.13 refuses to compile it).

    Raises:
        ValueError: when x, residual and weight do not fit together.
    """
    _check(x, weight_H)
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(
            f"residual {tuple(residual.shape)} {residual.dtype} is not like x "
            f"{tuple(x.shape)} {x.dtype}"
        )
    if not _fits(x, weight_H):
        return reference(x, weight_H, eps, residual, offset)
    return _AddRMSNorm.apply(x, residual, weight_H, eps, offset)


def _fits(x: Tensor, weight_H: Tensor) -> bool:
    return x.shape[-1] <= _LARGEST_ROW and uses_triton("rms norm", x, weight_H)


def _check(x: Tensor, weight_H: Tensor) -> None:
    if weight_H.shape != x.shape[-1:]:
        raise ValueError(f"weight {tuple(weight_H.shape)} does not fit x {tuple(x.shape)}")
