"""Rotary position embedding of queries and keys in one launch, with their norms where they have.

Mathematics (Su et al. 2021, arXiv 2104.09864, in the half-split layout of Hugging Face): the
first R of a head's D elements are two halves a and b; with the token's angles
    a' = a cos - b sin        b' = b cos + a sin        (elements R.. are left as they are)
so the backward pass turns by the opposite angle. Models with QK-norm (Qwen3, Gemma 3) first take
    x = x / sqrt(mean(x^2) + eps) * (weight + offset)            over the D elements of each head.
Angles are given per token, so packed rows whose positions restart need nothing special.
Without norms only cos and sin are saved; with norms the unnormalised q and k as well.

Values may go through, unchanged: the gradients of q, k and v then are columns of one matrix, which
the projections before them multiply at once (`lora_linear`). Copying that of v costs 0.01 ms, the
two products less save 0.09 (on paper: 8192 tokens, 32 and 8 heads of 128, H100).

Shape legend: T tokens, N query heads, K key heads, D head size, R rotated elements, P programs.
"""

from __future__ import annotations

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

_PROGRAMS_PER_MULTIPROCESSOR = 8


# ---- reference ----


def reference(
    x_TND: Tensor,
    cos_TH: Tensor,
    sin_TH: Tensor,
    weight_D: Tensor | None = None,
    eps: float = 0.0,
    offset: float = 0.0,
) -> Tensor:
    """One of q and k by the formula, rounded to its dtype at the end; cos and sin are [T, R/2]."""
    wide = x_TND.to(torch.promote_types(x_TND.dtype, torch.float32))
    if weight_D is not None:
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        wide = wide * (weight_D.to(wide.dtype) + offset)
    half = cos_TH.shape[1]
    cos, sin = (t.to(wide.dtype)[:, None] for t in (cos_TH, sin_TH))
    a, b, rest = wide.split([half, half, wide.shape[-1] - 2 * half], -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1).to(x_TND.dtype)


# ---- kernels ----


@jit
def _load(pointer, token_stride, head_stride, token, head, column, seen):
    place = token * token_stride + head[:, None] * head_stride + column[None, :]
    return tl.load(pointer + place, mask=seen, other=0.0).to(tl.float32)


@jit
def _store(pointer, token_stride, size, token, head, column, seen, value):
    place = token * token_stride + head[:, None] * size + column[None, :]
    tl.store(pointer + place, value, mask=seen)


@jit
def _columns(HALF: tl.constexpr, REST: tl.constexpr, HALF_BLOCK: tl.constexpr,
             REST_BLOCK: tl.constexpr):  # fmt: skip
    """Columns of a half, of the part not rotated, and which of them exist."""
    half = tl.arange(0, HALF_BLOCK)
    rest = tl.arange(0, REST_BLOCK)
    return half, half < HALF, rest + 2 * HALF, rest < REST


@jit
def _forward_heads(x, token_stride, head_stride, weight, y, cos, sin, angle_token, token, eps,
                   offset, HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
                   HEAD_BLOCK: tl.constexpr, HALF_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
                   HAS_NORM: tl.constexpr):  # fmt: skip
    size: tl.constexpr = 2 * HALF + REST
    head = tl.arange(0, HEAD_BLOCK)
    half, in_half, rest, in_rest = _columns(HALF, REST, HALF_BLOCK, REST_BLOCK)
    seen = (head < HEADS)[:, None] & in_half[None, :]
    seen_rest = (head < HEADS)[:, None] & in_rest[None, :]
    a = _load(x, token_stride, head_stride, token, head, half, seen)
    b = _load(x, token_stride, head_stride, token, head, half + HALF, seen)
    c = tl.load(cos + token * angle_token + half, mask=in_half, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + token * angle_token + half, mask=in_half, other=0.0).to(tl.float32)[None, :]
    e = _load(x, token_stride, head_stride, token, head, rest, seen_rest)  # nothing without a rest
    if HAS_NORM:
        squares = tl.sum(a * a + b * b, 1) + tl.sum(e * e, 1)
        r = tl.rsqrt(squares / size + eps)[:, None]
        wa = tl.load(weight + half, mask=in_half, other=0.0).to(tl.float32) + offset
        wb = tl.load(weight + half + HALF, mask=in_half, other=0.0).to(tl.float32) + offset
        a = a * r * wa[None, :]
        b = b * r * wb[None, :]
        if REST > 0:
            we = tl.load(weight + rest, mask=in_rest, other=0.0).to(tl.float32) + offset
            e = e * r * we[None, :]
    row: tl.constexpr = HEADS * size
    _store(y, row, size, token, head, half, seen, a * c - b * s)
    _store(y, row, size, token, head, half + HALF, seen, b * c + a * s)
    if REST > 0:
        _store(y, row, size, token, head, rest, seen_rest, e)


@jit
def _rope_forward_kernel(q, k, q_token, q_head, k_token, k_head, q_weight, k_weight, q_out, k_out,
                         cos, sin, angle_token, eps, offset, Q_HEADS: tl.constexpr,
                         K_HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
                         Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr, HALF_BLOCK: tl.constexpr,
                         REST_BLOCK: tl.constexpr, HAS_NORM: tl.constexpr):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    _forward_heads(q, q_token, q_head, q_weight, q_out, cos, sin, angle_token, token, eps, offset,
                   Q_HEADS, HALF, REST, Q_BLOCK, HALF_BLOCK, REST_BLOCK, HAS_NORM)  # fmt: skip
    _forward_heads(k, k_token, k_head, k_weight, k_out, cos, sin, angle_token, token, eps, offset,
                   K_HEADS, HALF, REST, K_BLOCK, HALF_BLOCK, REST_BLOCK, HAS_NORM)  # fmt: skip


@jit
def _backward_heads(dy, dy_token, dy_head, x, x_token, x_head, weight, dx, dx_token, cos, sin,
                    angle_token, token, eps, offset, HEADS: tl.constexpr, HALF: tl.constexpr,
                    REST: tl.constexpr, HEAD_BLOCK: tl.constexpr, HALF_BLOCK: tl.constexpr,
                    REST_BLOCK: tl.constexpr, HAS_NORM: tl.constexpr):  # fmt: skip
    """Writes dx of one token; returns its share of dweight: halves a and b, and the rest."""
    size: tl.constexpr = 2 * HALF + REST
    head = tl.arange(0, HEAD_BLOCK)
    half, in_half, rest, in_rest = _columns(HALF, REST, HALF_BLOCK, REST_BLOCK)
    seen = (head < HEADS)[:, None] & in_half[None, :]
    seen_rest = (head < HEADS)[:, None] & in_rest[None, :]
    c = tl.load(cos + token * angle_token + half, mask=in_half, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + token * angle_token + half, mask=in_half, other=0.0).to(tl.float32)[None, :]
    da = _load(dy, dy_token, dy_head, token, head, half, seen)
    db = _load(dy, dy_token, dy_head, token, head, half + HALF, seen)
    ga = da * c + db * s
    gb = db * c - da * s
    ge = _load(dy, dy_token, dy_head, token, head, rest, seen_rest)
    dwa = tl.zeros([HALF_BLOCK], tl.float32)
    dwb = tl.zeros([HALF_BLOCK], tl.float32)
    dwe = tl.zeros([REST_BLOCK], tl.float32)
    if HAS_NORM:
        a = _load(x, x_token, x_head, token, head, half, seen)
        b = _load(x, x_token, x_head, token, head, half + HALF, seen)
        e = _load(x, x_token, x_head, token, head, rest, seen_rest)
        r = tl.rsqrt((tl.sum(a * a + b * b, 1) + tl.sum(e * e, 1)) / size + eps)[:, None]
        a *= r
        b *= r
        e *= r
        dwa = tl.sum(ga * a, 0)
        dwb = tl.sum(gb * b, 0)
        dwe = tl.sum(ge * e, 0)
        wa = tl.load(weight + half, mask=in_half, other=0.0).to(tl.float32) + offset
        wb = tl.load(weight + half + HALF, mask=in_half, other=0.0).to(tl.float32) + offset
        we = tl.load(weight + rest, mask=in_rest, other=0.0).to(tl.float32) + offset
        ga *= wa[None, :]
        gb *= wb[None, :]
        ge *= we[None, :]
        along = (tl.sum(ga * a + gb * b, 1) + tl.sum(ge * e, 1))[:, None] / size
        ga = r * (ga - a * along)
        gb = r * (gb - b * along)
        ge = r * (ge - e * along)
    _store(dx, dx_token, size, token, head, half, seen, ga)
    _store(dx, dx_token, size, token, head, half + HALF, seen, gb)
    if REST > 0:
        _store(dx, dx_token, size, token, head, rest, seen_rest, ge)
    return dwa, dwb, dwe


@jit
def _copied_heads(x, x_token, x_head, y, y_token, token, HEADS: tl.constexpr, SIZE: tl.constexpr,
                  HEAD_BLOCK: tl.constexpr, SIZE_BLOCK: tl.constexpr):  # fmt: skip
    head = tl.arange(0, HEAD_BLOCK)
    column = tl.arange(0, SIZE_BLOCK)
    seen = (head < HEADS)[:, None] & (column < SIZE)[None, :]
    value = tl.load(x + token * x_token + head[:, None] * x_head + column[None, :], mask=seen)
    _store(y, y_token, SIZE, token, head, column, seen, value)


@jit
def _store_weight(dweight, dwa, dwb, dwe, HALF: tl.constexpr, REST: tl.constexpr,
                  HALF_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr):  # fmt: skip
    half, in_half, rest, in_rest = _columns(HALF, REST, HALF_BLOCK, REST_BLOCK)
    tl.store(dweight + half, dwa, mask=in_half)
    tl.store(dweight + half + HALF, dwb, mask=in_half)
    tl.store(dweight + rest, dwe, mask=in_rest)


@jit
def _rope_backward_kernel(dq, dk, dv, dq_token, dq_head, dk_token, dk_head, dv_token, dv_head, q, k,
                          q_token, q_head, k_token, k_head, q_weight, k_weight, out, out_token,
                          dweights, cos, sin, angle_token, tokens, eps, offset,
                          Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HALF: tl.constexpr,
                          REST: tl.constexpr, Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr,
                          HALF_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
                          HAS_NORM: tl.constexpr, HAS_V: tl.constexpr,
                          SIZE_BLOCK: tl.constexpr):  # fmt: skip
    """Program p takes tokens p, p + P, ...; dweights is [P, 2, D], queries then keys.

    Rows of `out` are the heads of queries, keys and values.
    """
    size: tl.constexpr = 2 * HALF + REST
    dq_out = out
    dk_out = out + Q_HEADS * size
    dv_out = dk_out + K_HEADS * size
    program = tl.program_id(0)
    qa = tl.zeros([HALF_BLOCK], tl.float32)
    qb = tl.zeros([HALF_BLOCK], tl.float32)
    qe = tl.zeros([REST_BLOCK], tl.float32)
    ka = tl.zeros([HALF_BLOCK], tl.float32)
    kb = tl.zeros([HALF_BLOCK], tl.float32)
    ke = tl.zeros([REST_BLOCK], tl.float32)
    for index in range(program, tokens, tl.num_programs(0)):
        token = tl.cast(index, tl.int64)
        a, b, e = _backward_heads(
            dq, dq_token, dq_head, q, q_token, q_head, q_weight, dq_out, out_token, cos, sin,
            angle_token, token, eps, offset, Q_HEADS, HALF, REST, Q_BLOCK, HALF_BLOCK, REST_BLOCK,
            HAS_NORM)  # fmt: skip
        qa += a
        qb += b
        qe += e
        a, b, e = _backward_heads(
            dk, dk_token, dk_head, k, k_token, k_head, k_weight, dk_out, out_token, cos, sin,
            angle_token, token, eps, offset, K_HEADS, HALF, REST, K_BLOCK, HALF_BLOCK, REST_BLOCK,
            HAS_NORM)  # fmt: skip
        ka += a
        kb += b
        ke += e
        if HAS_V:
            _copied_heads(dv, dv_token, dv_head, dv_out, out_token, token, K_HEADS, size, K_BLOCK,
                          SIZE_BLOCK)  # fmt: skip
    if HAS_NORM:
        part = dweights + program * 2 * size
        _store_weight(part, qa, qb, qe, HALF, REST, HALF_BLOCK, REST_BLOCK)
        _store_weight(part + size, ka, kb, ke, HALF, REST, HALF_BLOCK, REST_BLOCK)


# ---- host ----


def _sizes(q: Tensor, k: Tensor, cos: Tensor) -> list[int]:
    """The kernels' compile-time sizes, from Q_HEADS to REST_BLOCK."""
    half = cos.shape[1]
    rest = q.shape[2] - 2 * half
    blocks = [next_power_of_2(n) for n in (q.shape[1], k.shape[1], half, max(rest, 1))]
    return [q.shape[1], k.shape[1], half, rest, *blocks]


def _inner(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _angles(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, int]:
    """(cos, sin, elements from one token to the next): slices of wider matrices are not copied."""
    if cos.stride() != sin.stride() or cos.stride(-1) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    return cos, sin, cos.stride(0)


def _fake_forward(q, k, cos, sin, q_weight, k_weight, eps, offset):
    return q.new_empty(q.shape), k.new_empty(k.shape)


@custom_op(
    "rope_forward",
    "(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor? q_weight, Tensor? k_weight, float eps,"
    " float offset) -> (Tensor, Tensor)",
    _fake_forward,
)
def _forward(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor | None,
    k_weight: Tensor | None, eps: float, offset: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q, k, angles = _inner(q), _inner(k), _angles(cos, sin)
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    if len(q):
        _rope_forward_kernel[(len(q),)](
            q, k, *q.stride()[:2], *k.stride()[:2], q_weight if q_weight is not None else q,
            k_weight if k_weight is not None else k, q_out, k_out, *angles, eps, offset,
            *_sizes(q, k, cos), q_weight is not None,
        )  # fmt: skip
    return q_out, k_out


def _fake_backward(dq, dk, dv, cos, sin, q, k, q_weight, k_weight, eps, offset, room):
    tokens, heads, size = dq.shape
    heads += dk.shape[1] * (1 if dv is None else 2)
    weights = dq.new_empty(2, 0 if q_weight is None else size, dtype=torch.float32)
    return dq.new_empty(tokens, heads * size + room), weights


@custom_op(
    "rope_backward",
    "(Tensor dq, Tensor dk, Tensor? dv, Tensor cos, Tensor sin, Tensor? q, Tensor? k, "
    "Tensor? q_weight, Tensor? k_weight, float eps, float offset, int room) -> (Tensor, Tensor)",
    _fake_backward,
)
def _backward(
    dq: Tensor, dk: Tensor, dv: Tensor | None, cos: Tensor, sin: Tensor, q: Tensor | None,
    k: Tensor | None, q_weight: Tensor | None, k_weight: Tensor | None, eps: float, offset: float,
    room: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(heads of dq, dk and dv [T, (N + 2K) D + room], dweights [2, D] of both norms, or [2, 0])."""
    dq, dk, angles = _inner(dq), _inner(dk), _angles(cos, sin)
    v = dk if dv is None else _inner(dv)
    q, k = _inner(dq if q is None else q), _inner(dk if k is None else k)
    has_norm = q_weight is not None
    programs = min(len(dq), _PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(dq.device))
    tokens, heads, size = dq.shape
    partial_P2D = dq.new_empty(programs, 2, size if has_norm else 0, dtype=torch.float32)
    heads += dk.shape[1] * (1 if dv is None else 2)
    out = dq.new_empty(tokens, heads * size + room)
    if tokens:
        _rope_backward_kernel[(programs,)](
            dq, dk, v, *dq.stride()[:2], *dk.stride()[:2], *v.stride()[:2], q, k, *q.stride()[:2],
            *k.stride()[:2], q if q_weight is None else q_weight,
            k if k_weight is None else k_weight, out, out.shape[1], partial_P2D, *angles, tokens,
            eps, offset, *_sizes(dq, dk, cos), has_norm, dv is not None, next_power_of_2(size),
        )  # fmt: skip
    return out, partial_P2D.sum(0)


# ---- autograd and public ----


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cos, sin, q_weight, k_weight, eps, offset, gap):
        normed = (q, k, q_weight, k_weight) if q_weight is not None else (None,) * 4
        ctx.save_for_backward(cos, sin, *normed)
        ctx.eps, ctx.offset, ctx.gap = eps, offset, gap
        turned = _forward(q, k, cos, sin, q_weight, k_weight, eps, offset)
        return turned if v is None else (*turned, v)

    @staticmethod
    def backward(ctx, *grad_outputs):
        dq, dk, *more = grad_outputs
        given, gap = [dq, dk, *more], ctx.gap
        cos, sin, q, k, q_weight, k_weight = ctx.saved_tensors
        room = 0 if gap is None else gap.columns
        made, dweights = _backward(
            dq, dk, more[0] if more else None, cos, sin, q, k, q_weight, k_weight, ctx.eps,
            ctx.offset, room,
        )  # fmt: skip
        if gap is not None:
            gap.is_behind(made)
        widths = [part.shape[1] * part.shape[2] for part in given]
        parts = made.split([*widths, room], 1)
        dq, dk, *more = (
            part.unflatten(1, x.shape[1:]) for part, x in zip(parts, given, strict=False)
        )
        dv = more[0] if more else None
        dweights = [None, None] if q_weight is None else dweights.to(q_weight.dtype).unbind()
        return dq, dk, dv, None, None, *dweights, None, None, None


def rope(
    q_TND: Tensor,
    k_TKD: Tensor,
    cos_TR: Tensor,
    sin_TR: Tensor,
    *,
    v_TKD: Tensor | None = None,
    gap: Gap | None = None,
    q_weight_D: Tensor | None = None,
    k_weight_D: Tensor | None = None,
    eps: float = 1e-6,
    offset: float = 0.0,
) -> tuple[Tensor, ...]:
    """(q, k) turned by their tokens' angles, after their norms when weights are given.

    Args:
        q_TND, k_TKD: any strides (views into one QKV matrix are fine); results are contiguous.
        v_TKD: goes through and is returned third; its gradient then lies beside theirs.
        gap: is left free behind the gradients.
        cos_TR, sin_TR: [T, R/2], without the model's repetition of the second half.
        offset: 1 for Gemma's norms, whose weights are stored minus one.

    Raises:
        ValueError: when shapes do not fit together, or one norm weight of the two is missing.
    """
    tokens, _, size = q_TND.shape
    good = k_TKD.shape[0] == tokens and k_TKD.shape[2] == size and q_TND.dtype == k_TKD.dtype
    good = good and cos_TR.shape == sin_TR.shape and cos_TR.shape[0] == tokens
    if v_TKD is not None:
        good = good and v_TKD.shape == k_TKD.shape and v_TKD.dtype == k_TKD.dtype
    if not good or 2 * cos_TR.shape[1] > size or (q_weight_D is None) != (k_weight_D is None):
        raise ValueError(
            "rope takes q [T, N, D], k [T, K, D], cos and sin [T, R/2] with R <= D, and both norm "
            f"weights or none, not {tuple(q_TND.shape)}, {tuple(k_TKD.shape)}, "
            f"{tuple(cos_TR.shape)}, {tuple(sin_TR.shape)}"
        )
    if not uses_triton("rope", q_TND, k_TKD, cos_TR):
        return (
            reference(q_TND, cos_TR, sin_TR, q_weight_D, eps, offset),
            reference(k_TKD, cos_TR, sin_TR, k_weight_D, eps, offset),
            *(() if v_TKD is None else (v_TKD,)),
        )
    weights = q_weight_D, k_weight_D
    return _Rope.apply(q_TND, k_TKD, v_TKD, cos_TR, sin_TR, *weights, eps, offset, gap)
