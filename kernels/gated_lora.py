"""Gated activation between projections with low-rank updates, which it makes while it is at it.

Mathematics, with the names of `swiglu` and `lora_linear`; gate and up are what the frozen weights
give, d is dy W of `down`:
    g = gate + s_g h_g B_g^T      u = up + s_u h_u B_u^T      hidden = act(g) u     h = hidden A^T
    dhidden = d + dh A            dg = dhidden u act'(g)      du = dhidden act(g)   dA = dh^T hidden
None of the three sums reaches memory, and hidden is not written in the backward pass: each would be
a pass over [T, F] to write and one to read. Products of depth r are made on the tensor cores.

Forward, a program owns rows and walks over columns, so that its h stays in registers; backward it
owns columns and walks over rows, so that its dA does. Parts of h and dA are added up in a fixed
order afterwards. dg and du are columns of one matrix, for one product with the weights of both.

Shape legend: T tokens, F width of the hidden layer, r rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regrow.kernels import swiglu
from regrow.kernels.backend import (
    INTERPRETING,
    custom_op,
    jit,
    multiprocessors,
    tl,
    uses_triton,
)
from regrow.kernels.rank_gradients import padded, sum_parts
from regrow.kernels.swiglu import activate, rows_without_gaps

LARGEST_RANK = 32  # beyond it a tile's factors weigh as much as the tile
# Rows, columns, warps and stages of a tile, and programs of one multiprocessor: the best of eight
# tiles forward, ten backward, and three or four counts at 8192 x 14336, r = 16
# (tests/bench/gated_tiles.py, H100, 2026-11-22 and 23): 0.296 ms where the parts alone take 0.527,
# and 0.487 ms where they take 0.678.
_FORWARD = (64, 64, 4, 3, 24)
_BACKWARD = (16, 64, 4, 3, 24)


# ---- reference ----


def reference(
    gate: Tensor, up: Tensor, h_gate: Tensor, b_gate: Tensor, s_gate: float, h_up: Tensor,
    b_up: Tensor, s_up: float, a: Tensor, activation: str = "silu",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(hidden, h) by the formula."""
    g, u = gate + s_gate * h_gate @ b_gate.t(), up + s_up * h_up @ b_up.t()
    hidden = swiglu.reference(g, u, activation)
    return hidden, hidden @ a.t()


# ---- kernels ----


@jit
def _skinny(x, stride, row, row_seen, rank, DEPTH: tl.constexpr):
    """Rows of a matrix of r columns, [ROWS, DEPTH]."""
    r = tl.arange(0, DEPTH)
    mask = row_seen[:, None] & (r < rank)[None, :]
    return tl.load(x + row[:, None] * stride + r[None, :], mask=mask, other=0.0)


@jit
def _skinny_columns(x, row_stride, column_stride, column, column_seen, rank, DEPTH: tl.constexpr):
    """Columns of a matrix of r rows, [DEPTH, COLUMNS]."""
    r = tl.arange(0, DEPTH)
    mask = (r < rank)[:, None] & column_seen[None, :]
    place = r[:, None] * row_stride + column[None, :] * column_stride
    return tl.load(x + place, mask=mask, other=0.0)


@jit
def _forward_kernel(gate, up, gate_stride, up_stride, h_gate, h_up, h_gate_stride, h_up_stride,
                    b_gate, b_up, gate_rank, up_rank, gate_scaling, up_scaling, a, a_rank, out,
                    out_stride, h_parts, rows, width, span, KIND: tl.constexpr, DEPTH: tl.constexpr,
                    ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    row = tl.arange(0, ROWS)
    above = tl.program_id(0).to(tl.int64) * ROWS
    part = tl.program_id(1).to(tl.int64)
    row_seen = row < rows - above
    gate += above * gate_stride
    up += above * up_stride
    out += above * out_stride
    hg = _skinny(h_gate + above * h_gate_stride, h_gate_stride, row, row_seen, gate_rank, DEPTH)
    hu = _skinny(h_up + above * h_up_stride, h_up_stride, row, row_seen, up_rank, DEPTH)
    h = tl.zeros((ROWS, DEPTH), tl.float32)
    first = tl.program_id(1) * span
    for start in range(first, tl.minimum(first + span, width), COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        column_seen = column < width
        seen = row_seen[:, None] & column_seen[None, :]
        bg = _skinny_columns(b_gate, 1, gate_rank, column, column_seen, gate_rank, DEPTH)
        bu = _skinny_columns(b_up, 1, up_rank, column, column_seen, up_rank, DEPTH)
        a_tile = _skinny_columns(a, width, 1, column, column_seen, a_rank, DEPTH)
        g = tl.load(gate + row[:, None] * gate_stride + column[None, :], mask=seen, other=0.0)
        u = tl.load(up + row[:, None] * up_stride + column[None, :], mask=seen, other=0.0)
        g = g.to(tl.float32) + gate_scaling * tl.dot(hg, bg)
        u = u.to(tl.float32) + up_scaling * tl.dot(hu, bu)
        value, _ = activate(g, KIND)
        hidden = (value * u).to(out.dtype.element_ty)
        tl.store(out + row[:, None] * out_stride + column[None, :], hidden, mask=seen)
        h = tl.dot(hidden, tl.trans(a_tile), h)
    r = tl.arange(0, DEPTH)
    place = row[:, None] * a_rank + r[None, :]
    h_parts += (part * rows + above) * a_rank
    tl.store(h_parts + place, h, mask=row_seen[:, None] & (r < a_rank)[None, :])


@jit
def _backward_kernel(d, d_stride, gate, up, gate_stride, up_stride, h_gate, h_up, h_gate_stride,
                     h_up_stride, b_gate, b_up, gate_rank, up_rank, gate_scaling, up_scaling, a,
                     a_rank, dh, dh_stride, both, both_stride, da_parts, rows, width, run,
                     KIND: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr,
                     COLUMNS: tl.constexpr):  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.arange(0, ROWS)
    part = tl.program_id(1)
    column_seen = column < width
    bg = _skinny_columns(b_gate, 1, gate_rank, column, column_seen, gate_rank, DEPTH)
    bu = _skinny_columns(b_up, 1, up_rank, column, column_seen, up_rank, DEPTH)
    a_tile = _skinny_columns(a, width, 1, column, column_seen, a_rank, DEPTH)
    da = tl.zeros((COLUMNS, DEPTH), tl.float32)
    first = part * run
    for start in range(first, tl.minimum(first + run, rows), ROWS):
        above = tl.cast(start, tl.int64)
        row_seen = row < rows - start
        seen = row_seen[:, None] & column_seen[None, :]
        hg = _skinny(h_gate + above * h_gate_stride, h_gate_stride, row, row_seen, gate_rank, DEPTH)
        hu = _skinny(h_up + above * h_up_stride, h_up_stride, row, row_seen, up_rank, DEPTH)
        dh_tile = _skinny(dh + above * dh_stride, dh_stride, row, row_seen, a_rank, DEPTH)
        g_at = gate + above * gate_stride + row[:, None] * gate_stride + column[None, :]
        u_at = up + above * up_stride + row[:, None] * up_stride + column[None, :]
        d_at = d + above * d_stride + row[:, None] * d_stride + column[None, :]
        g = tl.load(g_at, mask=seen, other=0.0).to(tl.float32)
        u = tl.load(u_at, mask=seen, other=0.0).to(tl.float32)
        dx = tl.load(d_at, mask=seen, other=0.0).to(tl.float32)
        g += gate_scaling * tl.dot(hg, bg)
        u += up_scaling * tl.dot(hu, bu)
        dx += tl.dot(dh_tile, a_tile)
        value, slope = activate(g, KIND)
        dgate = both + above * both_stride + row[:, None] * both_stride + column[None, :]
        tl.store(dgate, dx * u * slope, mask=seen)
        tl.store(dgate + width, dx * value, mask=seen)
        hidden = (value * u).to(both.dtype.element_ty)
        da = tl.dot(tl.trans(hidden), dh_tile, da)
    r = tl.arange(0, DEPTH)
    # [part, r, F], as A lies
    place = (part.to(tl.int64) * a_rank + r[None, :]) * width + column[:, None]
    tl.store(da_parts + place, da, mask=column_seen[:, None] & (r < a_rank)[None, :])


# ---- host ----

_ADAPTERS = (
    "Tensor h_gate, Tensor b_gate, float s_gate, Tensor h_up, Tensor b_up, float s_up, Tensor a"
)


def takes(x: Tensor) -> bool:
    """Whether the kernels run for layers of such an input; there is no other way through here."""
    if x.dtype not in (torch.bfloat16, torch.float16):
        return False
    if INTERPRETING and x.dtype == torch.bfloat16:
        return False  # the interpreter's product takes its bits for whole numbers
    return uses_triton("gated activation with adapters", x)


def _fake_forward(gate, up, h_gate, b_gate, s_gate, h_up, b_up, s_up, a, activation, room):
    rows, width = gate.shape
    return gate.new_empty(rows, width + room)[:, :width], gate.new_empty(rows, len(a))


@custom_op(
    "gated_lora_forward",
    f"(Tensor gate, Tensor up, {_ADAPTERS}, str activation, int room) -> (Tensor, Tensor)",
    _fake_forward,
)
def forward(
    gate: Tensor, up: Tensor, h_gate: Tensor, b_gate: Tensor, s_gate: float, h_up: Tensor,
    b_up: Tensor, s_up: float, a: Tensor, activation: str, room: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(hidden [T, F], h [T, r] of down) from gate and up [T, F] without their low-rank parts.

    Args:
        room: columns behind hidden, which are left as they are.
    """
    tile_rows, tile_columns, warps, stages, programs = _FORWARD
    rows, width = gate.shape
    out, h = gate.new_empty(rows, width + room)[:, :width], gate.new_empty(rows, len(a))
    if not rows:
        return out, h
    row_tiles, tiles = -(-rows // tile_rows), -(-width // tile_columns)
    parts = min(tiles, -(-programs * multiprocessors(gate.device) // row_tiles))
    span = -(-tiles // parts) * tile_columns
    parts = -(-width // span)
    h_parts = torch.empty(parts, rows, len(a), dtype=torch.float32, device=gate.device)
    given = _given(gate, up, h_gate, b_gate, s_gate, h_up, b_up, s_up, a)
    _forward_kernel[(row_tiles, parts)](
        *given, out, width + room, h_parts, rows, width, span, activation, _depth(a, b_gate, b_up),
        tile_rows, tile_columns, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    sum_parts(h_parts, h)
    return out, h


def _fake_backward(d, gate, up, h_gate, b_gate, s_gate, h_up, b_up, s_up, a, dh, both, activation):
    return a.new_empty(a.shape, dtype=torch.float32)


@custom_op(
    "gated_lora_backward",
    f"(Tensor d, Tensor gate, Tensor up, {_ADAPTERS}, Tensor dh, Tensor(a!) both, str activation)"
    " -> Tensor",
    _fake_backward,
    ("both",),
)
def backward(
    d: Tensor, gate: Tensor, up: Tensor, h_gate: Tensor, b_gate: Tensor, s_gate: float,
    h_up: Tensor, b_up: Tensor, s_up: float, a: Tensor, dh: Tensor, both: Tensor, activation: str,
) -> Tensor:  # fmt: skip
    """dA [r, F] in float32 from d = dy W and dh of down.

    Args:
        both: where dgate and dup are written, beside each other; columns behind them are left as
            they are. d, or gate and up, may lie there: a program reads each number before it
            writes to its place, and no other program reads it.
    """
    tile_rows, tile_columns, warps, stages, programs = _BACKWARD
    rows, width = gate.shape
    da = torch.empty(a.shape, dtype=torch.float32, device=a.device)
    if not rows:
        return da.zero_()
    strips, tiles = -(-width // tile_columns), -(-rows // tile_rows)
    parts = min(tiles, -(-programs * multiprocessors(gate.device) // strips))
    run = -(-tiles // parts) * tile_rows
    parts = -(-rows // run)
    da_parts = torch.empty(parts, *a.shape, dtype=torch.float32, device=gate.device)
    d, dh = rows_without_gaps(d), rows_without_gaps(dh)
    given = _given(gate, up, h_gate, b_gate, s_gate, h_up, b_up, s_up, a)
    _backward_kernel[(strips, parts)](
        d, d.stride(0), *given, dh, dh.stride(0), both, both.stride(0), da_parts, rows, width, run,
        activation, _depth(a, b_gate, b_up), tile_rows, tile_columns, num_warps=warps,
        num_stages=stages,
    )  # fmt: skip
    sum_parts(da_parts, da)
    return da


def _given(
    gate: Tensor, up: Tensor, h_gate: Tensor, b_gate: Tensor, s_gate: float, h_up: Tensor,
    b_up: Tensor, s_up: float, a: Tensor,
) -> list[object]:  # fmt: skip
    """What both kernels are given, in their order."""
    gate, up, h_gate, h_up = (rows_without_gaps(x) for x in (gate, up, h_gate, h_up))
    strides = [x.stride(0) for x in (gate, up, h_gate, h_up)]
    ranks = [b_gate.shape[1], b_up.shape[1]]
    factors = [b_gate.contiguous(), b_up.contiguous(), *ranks, s_gate, s_up]
    return [gate, up, *strides[:2], h_gate, h_up, *strides[2:], *factors, a.contiguous(), len(a)]


def _depth(a: Tensor, *bs: Tensor) -> int:
    return padded(max(len(a), *(b.shape[1] for b in bs)))
