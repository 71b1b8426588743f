"""Linear layers of one input with their low-rank updates: one autograd node, no W + BA.

Mathematics (Hu et al. 2021, arXiv 2106.09685), for each projection of x [T, I]:
    h = drop(x) A^T            y = x W^T + s h B^T + bias
    dh = s dy B                dx = sum over projections of dy W + drop(dh A)
    dA = dh^T drop(x)          dB = s dy^T h              dW = dy^T x, dbias = sum dy when trained
s is alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv 2312.03732).

Order of the products. The skinny h B^T is written first, and the large GEMM adds itself to it
(beta = 1), which hides the addition in the GEMM's epilogue: 2.86 ms against 3.26 for the other
order and 2.88 for the base alone (8192 x 4096 x 28672, r = 32, H100, 2026-11-22). Where inputs and
weights have room for it, all is one product, [x | h] [W | sB]^T, with a residual too
(`joint_product`). An update is small beside all else: rounded together with a bias or a residual
alone it would be lost. They come last; a residual, where there is no bias, in one sum with update
and base (`low_rank_sum`). The A of all projections are one skinny GEMM. dh and dB are made in one
pass over dy (`rank_gradients`).

Saved: x, h (r columns) and the parameters, of which no adapter whose rounded copy someone keeps
(`projection.to_keep`); a base layer saves x and W. Adapters may be float32: they are rounded to the
dtype of x once, for both directions, and get gradients summed in float32. A weight may be wider
than x (float32 that is trained): it is rounded for each product, or once by its owner, who hands
the copy over as `rounded`; its gradient is then float32, without a rounding between. A frozen
weight may be a function that makes the dense matrix (nf4, int8): it is called once in each
direction, and its result is dropped after its GEMM, so that the allocator hands out one buffer
again and again. Or it is a `Float8Weight`, multiplied in 8 bits (see `float8`).

Neighbours. Where the dy of a group are columns of one matrix, and its weights lie one under the
other or can be made so (see `neighbours`), dx is one product: of q, k and v, or gate and up, two
or one times less of [T, I] is read and written. Where there is room behind the weights for A, and
behind the dy for dh, dh A is part of that product: [dy | dh] [W; A]. So is, for projections whose
h B^T is added elsewhere, h in the forward pass: [y | h] = x [W; A]^T.

Sharding (FSDP2, DeepSpeed ZeRO-3): call from inside the forward of the module whose hook gathers
the parameters. Gradient checkpointing may wrap the call. Of what is kept, frozen weights that are
no plain tensors and `rounded` copies are not saved tensors (`constants_of`): hooks on these see
none of them, and a gathered weight in 4 bits is read where FSDP2 gathers it again.
Under torch.compile dropout breaks the graph, because its seed is a number of the host.

Shape legend: T tokens, I inputs, O outputs, r rank of one projection, R sum of the ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from regrow.kernels.dropout import draw_seed
from regrow.kernels.float8 import Float8Weight, float8_product, quantize_rows
from regrow.kernels.joint_product import beside_weight, joint_products
from regrow.kernels.low_rank_sum import low_rank_sum, takes_sum
from regrow.kernels.matmul import matmul_exact
from regrow.kernels.neighbours import Gap, columns_of_one, rows_of_one
from regrow.kernels.projection import (
    TENSORS,
    Constants,
    Drop,
    Projection,
    below,
    below_with_adapters,
    check,
    check_residual,
    constants_of,
    dense,
    dropped,
    from_kept,
    held,
    keeps_low,
    tensors_of,
    to_keep,
)
from regrow.kernels.rank_gradients import one_pass

# ---- reference ----


def reference(x: Tensor, projection: Projection) -> Tensor:
    """One projection by the formula, without dropout."""
    bias = None if projection.bias is None else projection.bias.to(x.dtype)
    y = linear(x, dense(projection.weight, x.dtype), bias)
    if projection.a is None or projection.b is None:
        return y
    h = linear(x, projection.a.to(x.dtype))
    return y + projection.scaling * linear(h, projection.b.to(x.dtype))


# ---- host: the products, shared with `lora_mlp` ----


def cast_adapters(
    group: Sequence[Projection], dtype: torch.dtype
) -> tuple[Tensor | None, list[Tensor | None]]:
    """(all A in one matrix [R, I], B of each projection), as the products take them."""
    if keeps_low(group, dtype):
        parts = [p.low[0] for p in group if p.low is not None]
        joint = rows_of_one(parts)
        bs = [None if p.low is None else p.low[1] for p in group]
        return torch.cat(parts) if joint is None else joint, bs
    matrices = [projection.a for projection in group if projection.a is not None]
    bs: list[Any] = [projection.b for projection in group]
    alike = len({projection.rank for projection in group}) == 1 and len(group) > 1
    if matrices and alike and bs[0].dtype != dtype:  # neighbours, for one pass (`rank_gradients`)
        bs = list(torch.cat(bs).to(dtype).split([len(b) for b in bs]))
    bs = [None if b is None else b.to(dtype) for b in bs]
    if not matrices:
        return None, bs
    return (matrices[0] if len(matrices) == 1 else torch.cat(matrices)).to(dtype), bs


def kept_group(
    kept: Sequence[Any], constants: Sequence[Constants], dtype: torch.dtype
) -> tuple[list[Projection], list[Any]]:
    """(the projections, [all A, B of each]) from tensors of one input, or what `to_keep` gave."""
    casts, group = from_kept(kept, constants)
    if casts:
        return group, casts
    a_RI, bs = cast_adapters(group, dtype)
    return group, [a_RI, *bs]


def project(
    x_TI: Tensor,
    group: Sequence[Projection],
    a_RI: Tensor | None,
    bs: Sequence[Tensor | None],
    drop: Drop,
    h_TR: Tensor | None = None,
    residual_TO: Tensor | None = None,
    free_TJ: Tensor | None = None,
) -> tuple[list[Tensor], Tensor | None]:
    """(y [T, O] of each projection, h [T, R] of all, None when none has an adapter).

    Args:
        h_TR: where it is made already; `a_RI` is not looked at then.
        residual_TO: is added to the y of the only projection.
        free_TJ: room behind x, see `joint_product`.
    """
    if h_TR is None and a_RI is not None:
        h_TR = dropped(x_TI, drop) @ a_RI.t()
    if h_TR is not None and free_TJ is not None:
        ys = _as_joint_products(x_TI, h_TR, free_TJ, group, bs, residual_TO)
        if ys is not None:
            return ys, h_TR
    eighth = quantize_rows(x_TI) if _is_float8(group) else None
    parts = _parts(h_TR, group)
    assert residual_TO is None or len(group) == 1
    ys = [
        _one(x_TI, eighth, p, h, b, residual_TO) for p, h, b in zip(group, parts, bs, strict=True)
    ]
    return ys, h_TR


def _as_joint_products(
    x_TI: Tensor,
    h_TR: Tensor,
    free_TJ: Tensor,
    group: Sequence[Projection],
    bs: Sequence[Tensor | None],
    residual_TO: Tensor | None,
) -> list[Tensor] | None:
    """y [T, O] of each; None where a weight has no room for its B, or residual and bias meet."""
    biases = [None if p.bias is None else p.bias.to(x_TI.dtype) for p in group]
    if residual_TO is not None and biases != [None]:
        return None
    weights = [
        beside_weight(weight, p.beside, b, p.scaling)
        for weight, p, b in zip(held(group), group, bs, strict=True)
    ]
    whole = [weight for weight in weights if weight is not None and weight.dtype == x_TI.dtype]
    if len(whole) < len(group):
        return None
    return joint_products(x_TI, h_TR, free_TJ, whole, biases, residual_TO)


def project_apart(
    x_TI: Tensor,
    group: Sequence[Projection],
    a_RI: Tensor,
    drop: Drop,
    out_TK: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """(x W^T [T, O] of each projection ..., h [T, R] of all), not added up.

    Args:
        out_TK: of at least as many columns, which they are written to unless the weights' products
            make their own memory.
    """
    joint = below_with_adapters(group, a_RI, drop)
    if joint is None:
        return *project_bases(x_TI, group, out_TK), dropped(x_TI, drop) @ a_RI.t()
    widths = [*_widths(group), len(a_RI)]
    return _product(x_TI, joint, out_TK).split(widths, 1)


def project_bases(
    x_TI: Tensor, group: Sequence[Projection], out_TK: Tensor | None = None
) -> Sequence[Tensor]:
    """x W^T [T, O] of each projection; columns of one matrix where the weights are neighbours."""
    plain = all(p.bias is None for p in group)
    whole = below(group, x_TI.dtype) if plain else None
    frozen = [replace(p, a=None, b=None) for p in group] if whole is None else [whole]
    if out_TK is not None and plain and not _is_float8(group):
        ys, start = [], 0
        for projection in frozen:
            ys.append(_product(x_TI, projection.matrix(x_TI.dtype), out_TK[:, start:]))
            start += ys[-1].shape[1]
    else:
        ys, _ = project(x_TI, frozen, None, [None] * len(frozen), (0.0, 0))
    return ys if whole is None else ys[0].split(_widths(group), 1)


def _product(x_TI: Tensor, weight_OI: Tensor, out_TK: Tensor | None) -> Tensor:
    """x W^T [T, O], in the first columns of `out_TK` where it is given."""
    if out_TK is None:
        return x_TI @ weight_OI.t()
    return torch.mm(x_TI, weight_OI.t(), out=out_TK[:, : len(weight_OI)])


def _widths(group: Sequence[Projection]) -> list[int]:
    """Outputs of each projection, whose weight knows its shape."""
    weights: list[Any] = [projection.weight for projection in group]
    return [weight.shape[0] for weight in weights]


def _one(
    x_TI: Tensor,
    x8: tuple[Tensor, Tensor] | None,
    projection: Projection,
    h_Tr: Tensor | None,
    b_Or: Tensor | None,
    residual_TO: Tensor | None,
) -> Tensor:
    bias = None if projection.bias is None else projection.bias.to(x_TI.dtype)
    if h_Tr is None or b_Or is None:
        y_TO = _base(x_TI, x8, projection, bias)
        return y_TO if residual_TO is None else y_TO.add_(residual_TO)
    scaling = projection.scaling
    if bias is None and residual_TO is not None and takes_sum(h_Tr, b_Or, residual_TO):
        y_TO = _base(x_TI, x8, projection, None)
        return low_rank_sum(y_TO, h_Tr, b_Or, scaling, residual_TO)
    if isinstance(projection.weight, Float8Weight):  # whose product adds to nothing
        y_TO = _base(x_TI, x8, projection, None).addmm_(h_Tr, b_Or.t(), alpha=scaling)
    else:
        y_TO = h_Tr.new_empty(len(h_Tr), len(b_Or))
        y_TO = y_TO.addmm_(h_Tr, b_Or.t(), beta=0, alpha=scaling)
        y_TO = y_TO.addmm_(x_TI, projection.matrix(x_TI.dtype).t())
    for more in (bias, residual_TO):
        y_TO = y_TO if more is None else y_TO.add_(more)
    return y_TO


def _base(
    x_TI: Tensor, x8: tuple[Tensor, Tensor] | None, projection: Projection, bias: Tensor | None
) -> Tensor:
    """x W^T + bias [T, O]."""
    weight = projection.weight
    if not isinstance(weight, Float8Weight):
        return linear(x_TI, projection.matrix(x_TI.dtype), bias)
    assert x8 is not None
    y_TO = float8_product(*x8, weight.rows_OI, weight.row_scales_O, x_TI.dtype)
    return y_TO if bias is None else y_TO.add_(bias)


def rank_gradients(
    dys: Sequence[Tensor],
    h_TR: Tensor | None,
    group: Sequence[Projection],
    bs: Sequence[Tensor | None],
    dh_TR: Tensor | None = None,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """(dh [T, R], None when none has an adapter; dB [O, r] of each projection, exact).

    Args:
        dh_TR: where to write it.
    """
    ranks = sum(projection.rank for projection in group)
    if not ranks:
        return None, [None] * len(group)
    dh_TR = dys[0].new_empty(len(dys[0]), ranks) if dh_TR is None else dh_TR
    dy, b = _as_one_dy(dys, group, bs)
    if dy is not None and b is not None and h_TR is not None:
        widths = [part.shape[1] for part in dys]
        db_Or = one_pass(dy, h_TR, b, group[0].scaling, dh_TR, widths)
        return dh_TR, list(db_Or.split(widths))
    dbs: list[Tensor | None] = []
    parts = zip(_parts(h_TR, group), _parts(dh_TR, group), strict=True)
    for dy, projection, b, (h, dh) in zip(dys, group, bs, parts, strict=True):
        has = b is not None and h is not None and dh is not None
        widths = [dy.shape[1]]
        dbs.append(one_pass(dy, h, b, projection.scaling, dh, widths) if has else None)
    return dh_TR, dbs


def _as_one_dy(
    dys: Sequence[Tensor], group: Sequence[Projection], bs: Sequence[Any]
) -> tuple[Tensor | None, Tensor | None]:
    """(all dy [T, sum of O], all B [sum of O, r]) of neighbours with one rank and one scaling."""
    first = group[0]
    alike = all(p.rank == first.rank and p.scaling == first.scaling for p in group)
    if len(group) < 2 or not alike:
        return None, None
    return columns_of_one(dys), rows_of_one(bs)


def input_gradient(
    dys: Sequence[Tensor],
    dh_TR: Tensor | None,
    a_RI: Tensor | None,
    group: Sequence[Projection],
    drop: Drop,
) -> Tensor:
    """dx [T, I]."""
    dy = None if dh_TR is None else columns_of_one([*dys, dh_TR])
    joint = None if dy is None else below_with_adapters(group, a_RI, drop)
    if dy is not None and joint is not None:
        return dy @ joint
    after = _is_float8(group)  # whose product adds to nothing
    low = None if dh_TR is None or a_RI is None else (dh_TR, a_RI)
    dx_TI = None if low is None or after else dropped(low[0] @ low[1], drop)
    for dy, projection in zip(*_as_one(dys, group), strict=True):
        dx_TI = _through_base(dy, projection, dx_TI)
    assert dx_TI is not None, "a group has at least one projection"
    if low is not None and after:
        dx_TI = dx_TI.add_(dropped(low[0] @ low[1], drop)) if drop[0] else dx_TI.addmm_(*low)
    return dx_TI


def _as_one(
    dys: Sequence[Tensor], group: Sequence[Projection]
) -> tuple[Sequence[Tensor], Sequence[Projection]]:
    """One dy and one projection in place of several, where they are neighbours."""
    dy = columns_of_one(dys) if len(dys) > 1 else None
    whole = None if dy is None else below(group, dy.dtype)
    return (dys, group) if dy is None or whole is None else ([dy], [whole])


def through_base(dy_TO: Tensor, projection: Projection, out_TI: Tensor | None) -> Tensor:
    """dy W [T, I], in `out_TI` if given, unless the weight's product makes its own memory."""
    if out_TI is None or isinstance(projection.weight, Float8Weight):
        return _through_base(dy_TO, projection, None)
    return torch.mm(dy_TO, projection.matrix(dy_TO.dtype), out=out_TI)


def _through_base(dy_TO: Tensor, projection: Projection, dx_TI: Tensor | None) -> Tensor:
    """dx + dy W, in the memory of dx where there is one."""
    weight = projection.weight
    if isinstance(weight, Float8Weight):
        dy8, scales_T = quantize_rows(dy_TO)
        more = float8_product(dy8, scales_T, weight.columns_IO, weight.column_scales_I, dy_TO.dtype)
        return more if dx_TI is None else dx_TI.add_(more)
    matrix = projection.matrix(dy_TO.dtype)
    return dy_TO @ matrix if dx_TI is None else dx_TI.addmm_(dy_TO, matrix)


def parameter_gradients(
    dys: Sequence[Tensor],
    x_TI: Tensor | None,
    dbs: Sequence[Tensor | None],
    dh_TR: Tensor | None,
    group: Sequence[Projection],
    drop: Drop,
    wanted: Sequence[bool],
    da_RI: Tensor | None = None,
) -> list[Tensor | None]:
    """Gradients in the order of `tensors_of(group)`, `wanted` says which of them; perhaps wider
    than their parameters, whose type autograd gives them.

    Args:
        x_TI: may be None where `da_RI`, the gradient of all A, is given.
    """
    if da_RI is None and dh_TR is not None and x_TI is not None and any(wanted[1::TENSORS]):
        da_RI = matmul_exact(dh_TR.t(), dropped(x_TI, drop))
    grads: list[Tensor | None] = []
    start = 0
    for i, (dy, projection, db) in enumerate(zip(dys, group, dbs, strict=True)):
        wants_weight, wants_a, wants_b, wants_bias = wanted[TENSORS * i : TENSORS * (i + 1)]
        end = start + projection.rank
        grads.append(_weight_gradient(dy, x_TI, projection.weight) if wants_weight else None)
        grads.append(da_RI[start:end] if wants_a and da_RI is not None else None)
        grads.append(db if wants_b else None)
        grads.append(dy.sum(0) if wants_bias else None)
        start = end
    return grads


def _weight_gradient(dy_TO: Tensor, x_TI: Tensor | None, weight: Any) -> Tensor:
    """dW [O, I]: a weight that is wider than the products gets their sums as they are."""
    assert x_TI is not None
    if weight.dtype == torch.promote_types(dy_TO.dtype, torch.float32):
        return matmul_exact(dy_TO.t(), x_TI)
    return dy_TO.t() @ x_TI


def _is_float8(group: Sequence[Projection]) -> bool:
    return any(isinstance(projection.weight, Float8Weight) for projection in group)


def _parts(h_TR: Tensor | None, group: Sequence[Projection]) -> Iterator[Tensor | None]:
    """The columns of h that belong to each projection, None where it has no adapter."""
    start = 0
    for projection in group:
        rank = projection.rank
        yield None if h_TR is None or rank == 0 else h_TR[:, start : start + rank]
        start += rank


# ---- autograd and public ----


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, p, seed, gap, behind, constants, *tensors):
        x_TI = x.reshape(-1, x.shape[-1])
        free_TJ = None if behind is None else behind.behind([x_TI.data])
        group, (a_RI, *bs) = kept_group(tensors, constants, x.dtype)
        residual_TO = None if residual is None else residual.reshape(-1, residual.shape[-1])
        more = {"residual_TO": residual_TO, "free_TJ": free_TJ}
        ys, h_TR = project(x_TI, group, a_RI, bs, (p, seed), **more)
        kept = to_keep(group, tensors, [a_RI, *bs], x.dtype)
        ctx.save_for_backward(x_TI, h_TR, *kept)
        ctx.drop, ctx.gap, ctx.constants = (p, seed), gap, constants
        return tuple(like(y, x) for y in ys)

    @staticmethod
    def backward(ctx, *grad_outputs):
        x_TI, h_TR, *kept = ctx.saved_tensors
        group, (a_RI, *bs) = kept_group(kept, ctx.constants, x_TI.dtype)
        dys = [dy.reshape(-1, dy.shape[-1]) for dy in grad_outputs]
        wants_x, wants_residual, _, _, _, _, _, *wanted = ctx.needs_input_grad
        behind = None if ctx.gap is None or h_TR is None else ctx.gap.behind(dys)
        dh, dbs = rank_gradients(dys, h_TR, group, bs, behind)
        dx = input_gradient(dys, dh, a_RI, group, ctx.drop) if wants_x else None
        grads = parameter_gradients(dys, x_TI, dbs, dh, group, ctx.drop, wanted)
        dresidual = grad_outputs[0] if wants_residual else None
        return like(dx, grad_outputs[0]), dresidual, *(None,) * 5, *grads


def like(y_TO: Any, x: Tensor) -> Any:
    """[..., O] with the leading sizes of x [..., I]; None stays None.

    No view in autograd's eyes, which lets nobody change a view from a custom function in place.
    """
    if y_TO is None:
        return None
    return torch.ops.aten._unsafe_view(y_TO, [*x.shape[:-1], y_TO.shape[-1]])


def lora_linear(
    x: Tensor,
    *group: Projection,
    dropout: float = 0.0,
    residual: Tensor | None = None,
    gap: Gap | None = None,
    behind: Gap | None = None,
) -> tuple[Tensor, ...]:
    """y [..., O] of each projection of x [..., I] (q, k and v; or one alone), in the dtype of x.

    Args:
        residual: like y of the only projection, to which it is added.
        gap: of `gap_for`; whoever makes the gradients of y may leave it behind them.
        behind: what whoever made x has left behind it (`room_for`).
        dropout: probability of the low-rank path's dropout; one mask for the whole group. Give 0
            in evaluation.

    Raises:
        ValueError: when shapes do not fit together.
    """
    outputs = [check(x.shape[-1], projection) for projection in group]
    if residual is not None:
        check_residual(residual, x, outputs)
    seed = draw_seed() if dropout > 0 else 0
    tensors = tensors_of(group)
    constants = constants_of(group)
    return _LoRALinear.apply(x, residual, dropout, seed, gap, behind, constants, *tensors)
