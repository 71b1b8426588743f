"""Linear layers of one input with their low-rank updates: one autograd node, no W + BA.

Mathematics (Hu et al. 2021, arXiv 2106.09685), for each projection of x [T, I]:
    h = drop(x) A^T            y = x W^T + s h B^T + bias
    dh = s dy B                dx = sum over projections of dy W + drop(dh A)
    dA = dh^T drop(x)          dB = s dy^T h              dW = dy^T x, dbias = sum dy when trained
s is alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv 2312.03732).

Order of the products. The skinny h B^T is written first and the large GEMM adds itself to it
(beta = 1), which hides the addition in the GEMM's epilogue: 2.86 ms against 3.26 for the other
order and 2.88 for the base alone (8192 x 4096 x 28672, r = 32, H100, 2026-11-22). One GEMM over
[x | h] [W | sB]^T was no faster and wants the weights laid out anew. The A of all projections are
one skinny GEMM. dh and dB are made in one pass over dy (`rank_gradients`).

Saved: x, h (r columns) and the parameters; a base layer saves x and W. Adapters may be float32:
they are rounded to the dtype of x once, for both directions, and get gradients summed in float32.
A weight may be wider than x (float32 that is trained): it is rounded for each product, or once by
its owner, who hands the copy over as `rounded`; its gradient is then float32, without a rounding
between. A frozen weight may be a function that makes the dense matrix (nf4, int8): it is called
once in each direction, and its result is dropped after its GEMM, so that the allocator hands out
one buffer again and again. Or it is a `Float8Weight`, multiplied in 8 bits (see `float8`).

Sharding (FSDP2, DeepSpeed ZeRO-3): call from inside the forward of the module whose hook gathers
the parameters. Gradient checkpointing may wrap the call. Of what is kept, frozen weights that are
no plain tensors and `rounded` copies are not saved tensors (`constants_of`): hooks on these see
none of them, and a gathered weight in 4 bits is read where FSDP2 gathers it again.
Under torch.compile dropout breaks the graph, because its seed is a number of the host.

Shape legend: T tokens, I inputs, O outputs, r rank of one projection, R sum of the ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from regrow.kernels.dropout import draw_seed, seeded_dropout
from regrow.kernels.float8 import Float8Weight, dequantize, float8_product, quantize_rows
from regrow.kernels.matmul import matmul_exact
from regrow.kernels.rank_gradients import one_pass

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

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The weight [O, I] as the products take it."""
        if self.rounded is not None and self.rounded.dtype == dtype:
            return self.rounded
        return dense(self.weight, dtype)

    @property
    def rank(self) -> int:
        return 0 if self.a is None else self.a.shape[0]


Drop = tuple[float, int]  # probability and seed of the low-rank path's dropout


def dropped(x: Tensor, drop: Drop) -> Tensor:
    """x with the same elements dropped whenever it is asked with the same seed."""
    p, seed = drop
    return seeded_dropout(x, p, seed) if p > 0 else x


def dense(weight: Base, dtype: torch.dtype) -> Tensor:
    """The matrix [O, I] itself."""
    if isinstance(weight, Float8Weight):
        return dequantize(weight.rows_OI, weight.row_scales_O).to(dtype)
    return (weight if isinstance(weight, Tensor) else weight()).to(dtype)


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
    matrices = [projection.a for projection in group if projection.a is not None]
    bs = [None if projection.b is None else projection.b.to(dtype) for projection in group]
    if not matrices:
        return None, bs
    return (matrices[0] if len(matrices) == 1 else torch.cat(matrices)).to(dtype), bs


def project(
    x_TI: Tensor,
    group: Sequence[Projection],
    a_RI: Tensor | None,
    bs: Sequence[Tensor | None],
    drop: Drop,
    h_TR: Tensor | None = None,
) -> tuple[list[Tensor], Tensor | None]:
    """(y [T, O] of each projection, h [T, R] of all, None when none has an adapter).

    Args:
        h_TR: where it is made already; `a_RI` is not looked at then.
    """
    if h_TR is None and a_RI is not None:
        h_TR = dropped(x_TI, drop) @ a_RI.t()
    eighth = quantize_rows(x_TI) if _is_float8(group) else None
    parts = _parts(h_TR, group)
    ys = [_one(x_TI, eighth, p, h, b) for p, h, b in zip(group, parts, bs, strict=True)]
    return ys, h_TR


def _one(
    x_TI: Tensor,
    x8: tuple[Tensor, Tensor] | None,
    projection: Projection,
    h_Tr: Tensor | None,
    b_Or: Tensor | None,
) -> Tensor:
    bias = None if projection.bias is None else projection.bias.to(x_TI.dtype)
    if isinstance(projection.weight, Float8Weight):
        assert x8 is not None
        weight = projection.weight
        y_TO = float8_product(*x8, weight.rows_OI, weight.row_scales_O, x_TI.dtype)
        if h_Tr is not None and b_Or is not None:
            y_TO.addmm_(h_Tr, b_Or.t(), alpha=projection.scaling)
        return y_TO if bias is None else y_TO.add_(bias)
    if h_Tr is None or b_Or is None:
        return linear(x_TI, projection.matrix(x_TI.dtype), bias)
    if bias is None:
        y_TO = x_TI.new_empty(len(x_TI), len(b_Or))
        y_TO.addmm_(h_Tr, b_Or.t(), beta=0, alpha=projection.scaling)
    else:
        y_TO = torch.addmm(bias, h_Tr, b_Or.t(), alpha=projection.scaling)
    return y_TO.addmm_(x_TI, projection.matrix(x_TI.dtype).t())


def rank_gradients(
    dys: Sequence[Tensor],
    h_TR: Tensor | None,
    group: Sequence[Projection],
    bs: Sequence[Tensor | None],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """(dh [T, R], None when none has an adapter; dB [O, r] of each projection, exact)."""
    ranks = sum(projection.rank for projection in group)
    if not ranks:
        return None, [None] * len(group)
    dh_TR = dys[0].new_empty(len(dys[0]), ranks)
    dbs: list[Tensor | None] = []
    parts = zip(_parts(h_TR, group), _parts(dh_TR, group), strict=True)
    for dy, projection, b, (h, dh) in zip(dys, group, bs, parts, strict=True):
        has = b is not None and h is not None and dh is not None
        dbs.append(one_pass(dy, h, b, projection.scaling, dh) if has else None)
    return dh_TR, dbs


def input_gradient(
    dys: Sequence[Tensor],
    dh_TR: Tensor | None,
    a_RI: Tensor | None,
    group: Sequence[Projection],
    drop: Drop,
) -> Tensor:
    """dx [T, I]."""
    dx_TI = None if dh_TR is None or a_RI is None else dropped(dh_TR @ a_RI, drop)
    for dy, projection in zip(dys, group, strict=True):
        dx_TI = _through_base(dy, projection, dx_TI)
    assert dx_TI is not None, "a group has at least one projection"
    return dx_TI


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
    """Gradients in the order of `tensors_of(group)`; `wanted` says which of them.

    Args:
        x_TI: may be None where `da_RI`, the gradient of all A, is given.
    """
    if da_RI is None and dh_TR is not None and x_TI is not None and any(wanted[1::4]):
        da_RI = matmul_exact(dh_TR.t(), dropped(x_TI, drop))
    grads: list[Tensor | None] = []
    start = 0
    for i, (dy, projection, db) in enumerate(zip(dys, group, dbs, strict=True)):
        wants_weight, wants_a, wants_b, wants_bias = wanted[4 * i : 4 * i + 4]
        end = start + projection.rank
        grads.append(_weight_gradient(dy, x_TI, projection.weight) if wants_weight else None)
        grads.append(da_RI[start:end] if wants_a and da_RI is not None else None)
        grads.append(db if wants_b else None)
        grads.append(dy.sum(0) if wants_bias else None)
        start = end
    return [
        None if grad is None else grad.to(tensor.dtype)
        for grad, tensor in zip(grads, tensors_of(group), strict=True)
    ]


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


# ---- between projections and autograd, which sees a flat list of tensors ----

Constants = tuple[Callable[[], Tensor] | Float8Weight | None, float, Tensor | None]


def tensors_of(group: Sequence[Projection]) -> list[Any]:
    """weight (None where it is no plain tensor), a, b, bias of each projection."""
    return [
        tensor
        for p in group
        for tensor in (p.weight if isinstance(p.weight, Tensor) else None, p.a, p.b, p.bias)
    ]


def constants_of(group: Sequence[Projection]) -> tuple[Constants, ...]:
    """What of each projection autograd does not see."""
    return tuple(
        (None if isinstance(p.weight, Tensor) else p.weight, p.scaling, p.rounded) for p in group
    )


def group_of(tensors: Sequence[Any], constants: Sequence[Constants]) -> list[Projection]:
    """The projections again, from `tensors_of` and `constants_of`."""
    group = []
    for i, (frozen, scaling, rounded) in enumerate(constants):
        weight, a, b, bias = tensors[4 * i : 4 * i + 4]
        whole = weight if frozen is None else frozen
        group.append(Projection(whole, a, b, scaling, bias, rounded))
    return group


# ---- autograd and public ----


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p, seed, constants, *tensors):
        x_TI = x.reshape(-1, x.shape[-1])
        group = group_of(tensors, constants)
        a_RI, bs = cast_adapters(group, x.dtype)
        ys, h_TR = project(x_TI, group, a_RI, bs, (p, seed))
        ctx.save_for_backward(x_TI, h_TR, a_RI, *bs, *tensors)
        ctx.drop, ctx.constants = (p, seed), constants
        return tuple(like(y, x) for y in ys)

    @staticmethod
    def backward(ctx, *grad_outputs):
        x_TI, h_TR, a_RI, *rest = ctx.saved_tensors
        count = len(ctx.constants)
        bs, tensors = rest[:count], rest[count:]
        group = group_of(tensors, ctx.constants)
        dys = [dy.reshape(-1, dy.shape[-1]) for dy in grad_outputs]
        wants_x, _, _, _, *wanted = ctx.needs_input_grad
        dh, dbs = rank_gradients(dys, h_TR, group, bs)
        dx = input_gradient(dys, dh, a_RI, group, ctx.drop) if wants_x else None
        grads = parameter_gradients(dys, x_TI, dbs, dh, group, ctx.drop, wanted)
        return like(dx, grad_outputs[0]), None, None, None, *grads


def like(y_TO: Any, x: Tensor) -> Any:
    """[..., O] with the leading sizes of x [..., I]; None stays None.

    No view in autograd's eyes, which lets nobody change a view from a custom function in place.
    """
    if y_TO is None:
        return None
    return torch.ops.aten._unsafe_view(y_TO, [*x.shape[:-1], y_TO.shape[-1]])


def lora_linear(x: Tensor, *group: Projection, dropout: float = 0.0) -> tuple[Tensor, ...]:
    """y [..., O] of each projection of x [..., I] (q, k and v; or one alone), in the dtype of x.

    Args:
        dropout: probability of the low-rank path's dropout; one mask for the whole group. Give 0
            in evaluation.

    Raises:
        ValueError: when shapes do not fit together.
    """
    for projection in group:
        check(x.shape[-1], projection)
    seed = draw_seed() if dropout > 0 else 0
    return _LoRALinear.apply(x, dropout, seed, constants_of(group), *tensors_of(group))


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
