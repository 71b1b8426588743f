"""Both gradients that a low-rank update takes from dy, in one pass over dy.

Mathematics, of y = ... + s h B^T (see `lora_linear`):
    dh = s dy B  [T, r]          dB = s dy^T h  [O, r]
Each is a GEMM of r columns, which takes as long as reading dy does. Here a program reads a tile of
dy once and multiplies it both ways. It owns some columns and a run of rows: its part of dB stays in
registers, its parts of dh are written in float32. A second kernel adds the parts up, in a fixed
order: 0.125 ms where the two GEMMs take 0.175 (8192 x 14336, r = 16, H100, 2026-11-22). Narrower
matrices gain less than two launches cost the host (8192 x 4096: 0.051 against 0.063 ms).

Shape legend: T tokens, O outputs, r rank, P parts.
"""

from __future__ import annotations

import functools
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
_LEAST_COLUMNS = 1 if INTERPRETING else 8192  # fewer are two GEMMs
# Rows, columns, warps and stages of a tile, the largest first: the fastest of fifteen on an H100,
# and what fits where a program has less memory.
_TILES = ((128, 256, 8, 3), (64, 256, 4, 3), (64, 128, 4, 3))
_PROGRAMS = 4  # of one multiprocessor at least
_SMALLEST_MEMORY = 48 << 10  # bytes that a program has on any card
_SUMS, _AT_ONCE = 256, 16  # numbers of a program that adds up, and parts that it reads at once


# ---- reference ----


def reference(dy_TO: Tensor, h_Tr: Tensor, b_Or: Tensor, scale: float, dh_Tr: Tensor) -> Tensor:
    """Writes dh [T, r]; dB [O, r] in float32 at least. Two products."""
    dh_Tr.addmm_(dy_TO, b_Or, beta=0, alpha=scale)
    return matmul_exact(dy_TO.t(), h_Tr, scale=scale)


# ---- kernels ----


@jit
def _both_kernel(
    dy,
    h,
    b,
    dh_parts,
    db_parts,
    rows,
    columns,
    run,
    dy_stride,
    h_stride,
    b_stride,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    strip = tl.program_id(0)
    part = tl.program_id(1)
    column = strip * COLUMNS + tl.arange(0, COLUMNS)
    in_columns = column < columns
    rank = tl.arange(0, PADDED)
    in_rank = rank < RANK
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
                     blocks, scale, RANK: tl.constexpr, PARTS: tl.constexpr,
                     BLOCK: tl.constexpr):  # fmt: skip
    block = tl.program_id(0)
    if block < blocks:
        _sum(dh_parts, dh, strips, dh_numbers, scale, dh_stride, block, RANK, PARTS, BLOCK)
    else:
        _sum(db_parts, db, runs, db_numbers, scale, RANK, block - blocks, RANK, PARTS, BLOCK)


# ---- host ----


def _fake_both(dy_TO, h_Tr, b_Or, scale, dh_Tr):
    exact = torch.promote_types(dy_TO.dtype, torch.float32)
    return b_Or.new_empty(b_Or.shape, dtype=exact)


@custom_op(
    "rank_gradients",
    "(Tensor dy, Tensor h, Tensor b, float scale, Tensor(a!) dh) -> Tensor",
    _fake_both,
    mutates=("dh",),
)
def one_pass(dy_TO: Tensor, h_Tr: Tensor, b_Or: Tensor, scale: float, dh_Tr: Tensor) -> Tensor:
    """Writes dh = s dy B into `dh_Tr`; returns dB = s dy^T h [O, r] in float32 at least."""
    if not _takes(dy_TO, h_Tr, b_Or, dh_Tr):
        return reference(dy_TO, h_Tr, b_Or, scale, dh_Tr)
    (rows, columns), rank, device = dy_TO.shape, h_Tr.shape[1], dy_TO.device
    tile, strips, runs, run = _division(rows, columns, rank, device)
    db_Or = torch.empty(columns, rank, dtype=torch.float32, device=device)
    dh_parts = torch.empty(strips, rows, rank, dtype=torch.float32, device=device)
    db_parts = torch.empty(runs, columns, rank, dtype=torch.float32, device=device)
    tile_rows, tile_columns, warps, stages = tile
    _both_kernel[(strips, runs)](
        dy_TO, h_Tr, b_Or, dh_parts, db_parts, rows, columns, run,
        dy_TO.stride(0), h_Tr.stride(0), b_Or.stride(0), rank, padded(rank), tile_rows,
        tile_columns, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    dh_numbers, db_numbers = rows * rank, columns * rank
    blocks = -(-dh_numbers // _SUMS)
    _sum_both_kernel[(blocks + -(-db_numbers // _SUMS),)](
        dh_parts, dh_Tr, strips, dh_numbers, dh_Tr.stride(0), db_parts, db_Or, runs, db_numbers,
        blocks, scale, rank, _AT_ONCE, _SUMS, num_warps=4,
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


def _takes(dy_TO: Tensor, *skinny: Tensor) -> bool:
    """Whether the kernels run: 16 bits, many columns, rows without gaps, a small rank."""
    return (
        dy_TO.shape[1] >= _LEAST_COLUMNS
        and dy_TO.dtype in (torch.bfloat16, torch.float16)
        and all(x.stride(1) == 1 and x.dtype == dy_TO.dtype for x in (dy_TO, *skinny))
        and 0 < skinny[0].shape[1] <= LARGEST_RANK
        and len(dy_TO) > 0
        and uses_triton("rank_gradients", dy_TO, *skinny)
        and _memory(_TILES[-1], skinny[0].shape[1]) <= _room(dy_TO.device)
    )
