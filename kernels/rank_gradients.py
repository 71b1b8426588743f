"""Both gradients that a low-rank update takes from dy, in one pass over dy.

Mathematics, of y = ... + s h B^T (see `lora_linear`):
    dh = s dy B  [T, r]          dB = s dy^T h  [O, r]
Each is a GEMM of r columns, which takes as long as reading dy does. Here a program reads a tile of
dy once and multiplies it both ways. It owns some columns and a run of rows: its part of dB stays in
registers, its parts of dh are written in float32. A second kernel adds the parts up, in a fixed
order: 0.125 ms where the two GEMMs take 0.175 (8192 x 14336, r = 16, H100, 2026-11-22). Narrower
matrices gain less than two launches cost the host (8192 x 4096: 0.051 against 0.063 ms).

Projections of one input whose dy are columns of one matrix, whose h are too, and whose B lie one
under the other are one pass: each strip of columns takes the h of its own projection.

Shape legend: T tokens, O outputs of all, r rank, R sum of the ranks, P parts.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from regrow.kernels.backend import (
    INTERPRETING,
    custom_op,
    jit,
    multiprocessors,
    next_power_of_2,
    tl,
    uses_triton,
)
from regrow.kernels.matmul import matmul_exact

# Parts of dh add 8 r / 256 bytes to the 2 of each element of dy, of which the two GEMMs read 4:
# 2.5 for r = 16, 3 for 32. Only r = 16 has been timed.
LARGEST_RANK = 32
_LEAST_COLUMNS = 1 if INTERPRETING else 8192  # fewer are two GEMMs; times the projections
_MOST_PROJECTIONS = 3
# Rows, columns, warps and stages of a tile, the largest first: the fastest of fifteen on an H100,
# and what fits where a program has less memory.
_TILES = ((128, 256, 8, 3), (64, 256, 4, 3), (64, 128, 4, 3))
_PROGRAMS = 4  # of one multiprocessor at least
_SMALLEST_MEMORY = 48 << 10  # bytes that a program has on any card
_SUMS, _AT_ONCE = 256, 16  # numbers of a program that adds up, and parts that it reads at once


# ---- reference ----


def reference(
    dy_TO: Tensor, h_TR: Tensor, b_Or: Tensor, scale: float, dh_TR: Tensor, widths: Sequence[int]
) -> Tensor:
    """Writes dh [T, R]; dB [O, r] in float32 at least. Two products of each projection."""
    rank = b_Or.shape[1]
    parts = dy_TO.split(widths, 1), b_Or.split(widths), h_TR.split(rank, 1), dh_TR.split(rank, 1)
    dbs = []
    for dy, b, h, dh in zip(*parts, strict=True):
        dh.addmm_(dy, b, beta=0, alpha=scale)
        dbs.append(matmul_exact(dy.t(), h, scale=scale))
    return dbs[0] if len(dbs) == 1 else torch.cat(dbs)


# ---- kernels ----


@jit
def _both_kernel(dy, h, b, dh_parts, db_parts, rows, columns, run, second, third, dy_stride,
                 h_stride, b_stride, RANK: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
                 COLUMNS: tl.constexpr):  # fmt: skip
    """`second`, `third`: the first strips of other projections, whose h are columns further on."""
    strip = tl.program_id(0)
    part = tl.program_id(1)
    column = strip * COLUMNS + tl.arange(0, COLUMNS)
    in_columns = column < columns
    rank = tl.arange(0, PADDED)
    in_rank = rank < RANK
    if strip >= third:
        h += 2 * RANK
    elif strip >= second:
        h += RANK
    b_tile = tl.load(
        b + column.to(tl.int64)[:, None] * b_stride + rank[None, :],
        mask=in_columns[:, None] & in_rank[None, :],
        other=0.0,
    )
    db = tl.zeros((COLUMNS, PADDED), tl.float32)
    first = part * run
    for start in range(first, tl.minimum(first + run, rows), ROWS):
        row = start + tl.arange(0, ROWS)
        in_rows = row < rows
        far = row.to(tl.int64)[:, None]
        dy_tile = tl.load(
            dy + far * dy_stride + column[None, :],
            mask=in_rows[:, None] & in_columns[None, :],
            other=0.0,
        )
        h_tile = tl.load(
            h + far * h_stride + rank[None, :],
            mask=in_rows[:, None] & in_rank[None, :],
            other=0.0,
        )
        dh = tl.dot(dy_tile, b_tile)
        db = tl.dot(tl.trans(dy_tile), h_tile, db)
        at = (strip.to(tl.int64) * rows + far) * RANK + rank[None, :]
        tl.store(dh_parts + at, dh, mask=in_rows[:, None] & in_rank[None, :])
    at = (part.to(tl.int64) * columns + column[:, None]) * RANK + rank[None, :]
    tl.store(db_parts + at, db, mask=in_columns[:, None] & in_rank[None, :])


@jit
def _sum(parts, out, count, numbers, scale, out_stride, block, WIDTH: tl.constexpr,
         PARTS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    part = tl.arange(0, PARTS)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, count, PARTS):
        many = first + part
        tile = tl.load(
            parts + many.to(tl.int64)[:, None] * numbers + at[None, :],
            mask=(many < count)[:, None] & (at < numbers)[None, :],
            other=0.0,
        )
        total += tl.sum(tile, 0)
    place = at // WIDTH * out_stride + at % WIDTH
    tl.store(out + place, (total * scale).to(out.dtype.element_ty), mask=at < numbers)


@jit
def _sum_kernel(parts, out, count, numbers, out_stride, WIDTH: tl.constexpr, PARTS: tl.constexpr,
                BLOCK: tl.constexpr):  # fmt: skip
    _sum(parts, out, count, numbers, 1.0, out_stride, tl.program_id(0), WIDTH, PARTS, BLOCK)


@jit
def _sum_both_kernel(dh_parts, dh, strips, dh_numbers, dh_stride, db_parts, db, runs, db_numbers,
                     blocks, second, third, scale, PROJECTIONS: tl.constexpr, RANK: tl.constexpr,
                     PARTS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """The first blocks are those of dh, projection after projection; `second`: its first strip."""
    block = tl.program_id(0)
    which = block // blocks
    first = tl.where(which == 0, 0, tl.where(which == 1, second, third))
    end = tl.where(which == 0, second, tl.where(which == 1, third, strips))
    if which < PROJECTIONS:
        _sum(dh_parts + first.to(tl.int64) * dh_numbers, dh + which * RANK, end - first, dh_numbers,
             scale, dh_stride, block - which * blocks, RANK, PARTS, BLOCK)  # fmt: skip
    else:
        _sum(db_parts, db, runs, db_numbers, scale, RANK, block - PROJECTIONS * blocks, RANK, PARTS,
             BLOCK)  # fmt: skip


# ---- host ----


def _fake_both(dy_TO, h_TR, b_Or, scale, dh_TR, widths):
    exact = torch.promote_types(dy_TO.dtype, torch.float32)
    return b_Or.new_empty(b_Or.shape, dtype=exact)


@custom_op(
    "rank_gradients",
    "(Tensor dy, Tensor h, Tensor b, float scale, Tensor(a!) dh, int[] widths) -> Tensor",
    _fake_both,
    mutates=("dh",),
)
def one_pass(
    dy_TO: Tensor, h_TR: Tensor, b_Or: Tensor, scale: float, dh_TR: Tensor, widths: Sequence[int]
) -> Tensor:
    """Writes dh = s dy B into `dh_TR`; returns dB = s dy^T h [O, r] in float32 at least.

    Args:
        widths: columns of dy that belong to each projection.
    """
    if not _takes(widths, dy_TO, h_TR, b_Or, dh_TR):
        return reference(dy_TO, h_TR, b_Or, scale, dh_TR, widths)
    (rows, columns), rank, device = dy_TO.shape, b_Or.shape[1], dy_TO.device
    tile, strips, runs, run = _division(rows, columns, rank, device)
    begins = [begin // tile[1] for begin in accumulate(widths[:-1])]
    if any(begin % tile[1] for begin in accumulate(widths[:-1])):
        return reference(dy_TO, h_TR, b_Or, scale, dh_TR, widths)
    second, third = [*begins, strips, strips][:2]
    db_Or = torch.empty(columns, rank, dtype=torch.float32, device=device)
    dh_parts = torch.empty(strips, rows, rank, dtype=torch.float32, device=device)
    db_parts = torch.empty(runs, columns, rank, dtype=torch.float32, device=device)
    tile_rows, tile_columns, warps, stages = tile
    _both_kernel[(strips, runs)](
        dy_TO, h_TR, b_Or, dh_parts, db_parts, rows, columns, run, second, third,
        dy_TO.stride(0), h_TR.stride(0), b_Or.stride(0), rank, padded(rank), tile_rows,
        tile_columns, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    dh_numbers, db_numbers = rows * rank, columns * rank
    blocks = -(-dh_numbers // _SUMS)
    _sum_both_kernel[(len(widths) * blocks + -(-db_numbers // _SUMS),)](
        dh_parts, dh_TR, strips, dh_numbers, dh_TR.stride(0), db_parts, db_Or, runs, db_numbers,
        blocks, second, third, scale, len(widths), rank, _AT_ONCE, _SUMS, num_warps=4,
    )  # fmt: skip
    return db_Or


@functools.lru_cache(maxsize=256)
def _division(
    rows: int, columns: int, rank: int, device: torch.device
) -> tuple[tuple[int, int, int, int], int, int, int]:
    """(tile, strips of columns, runs of rows, rows of a run)."""
    tile = next(tile for tile in _TILES if _memory(tile, rank) <= _room(device))
    strips, tiles = -(-columns // tile[1]), -(-rows // tile[0])
    runs = min(tiles, -(-_PROGRAMS * multiprocessors(device) // strips))
    run = -(-tiles // runs) * tile[0]
    return tile, strips, -(-rows // run), run


def padded(rank: int) -> int:
    """The depth of the tensor cores' products, which have a least one."""
    return max(16, next_power_of_2(rank))


def _memory(tile: tuple[int, int, int, int], rank: int) -> int:
    """Bytes of shared memory that a program takes on Hopper: tiles of dy and h, of B, and of dh.

    Blackwell's data center cards want 32 more; others less than half, and get smaller tiles than
    they could have (Triton 3.7).
    """
    rows, columns, _, stages = tile
    return 2 * (stages * rows * (columns + padded(rank)) + (columns + 2 * rows) * padded(rank))


@functools.lru_cache(maxsize=16)
def _room(device: torch.device) -> int:
    """Bytes of shared memory that a program may take."""
    if device.type != "cuda":
        return 1 << 30
    found: Any = torch.cuda.get_device_properties(device)
    return getattr(found, "shared_memory_per_block_optin", _SMALLEST_MEMORY)


def sum_parts(parts: Tensor, out: Tensor) -> None:
    """out [N, M] = the sum of parts [P, N, M], in the order of P; by Triton."""
    numbers = out.numel()
    _sum_kernel[(-(-numbers // _SUMS),)](
        parts, out, len(parts), numbers, out.stride(0), out.shape[1], _AT_ONCE, _SUMS, num_warps=4
    )


def _takes(widths: Sequence[int], dy_TO: Tensor, *skinny: Tensor) -> bool:
    """Whether the kernels run: 16 bits, many columns, rows without gaps, a small rank."""
    return (
        dy_TO.shape[1] * len(widths) >= _LEAST_COLUMNS
        and len(widths) <= _MOST_PROJECTIONS
        and dy_TO.dtype in (torch.bfloat16, torch.float16)
        and all(x.stride(1) == 1 and x.dtype == dy_TO.dtype for x in (dy_TO, *skinny))
        and 0 < skinny[1].shape[1] <= LARGEST_RANK
        and len(dy_TO) > 0
        and uses_triton("rank_gradients", dy_TO, *skinny)
        and _memory(_TILES[-1], skinny[1].shape[1]) <= _room(dy_TO.device)
    )
