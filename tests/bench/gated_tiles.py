"""Times tiles and program counts of the gated activation with adapters, and of its neighbours.

On a machine with a GPU, from the repository's root (up to 25 s for each kind):

    PYTHONPATH=$PWD/infra/typing python -m tests.bench.gated_tiles [forward] [backward] [sum] [rank]

Prints the fastest first, in microseconds. The memory alone takes 235 (forward) and 390
(backward) at 3 TB/s for 8192 x 14336 in bfloat16. What does not fit into a program is left out.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton

from regrow.kernels import gated_lora, low_rank_sum, rank_gradients

TOKENS, WIDTH, HIDDEN, RANK = 8192, 14336, 4096, 16
BUDGET = 25  # seconds of each kind
# Rows, columns, warps, stages; the one in use first.
FORWARD = [
    (64, 64, 4, 3),
    (64, 64, 4, 1),
    (32, 64, 4, 3),
    (16, 64, 4, 3),
    (32, 64, 4, 2),
    (16, 128, 4, 3),
    (32, 128, 8, 2),
    (64, 32, 4, 3),
]
BACKWARD = [
    (16, 64, 4, 3),
    (32, 64, 4, 2),
    (32, 64, 4, 3),
    (32, 64, 8, 2),
    (64, 64, 8, 2),
    (16, 128, 4, 2),
    (32, 128, 8, 2),
    (16, 64, 2, 3),
    (64, 32, 4, 2),
    (16, 128, 8, 3),
]
RANK_TILES = [(128, 256, 8, 3), (64, 256, 8, 4), (64, 256, 4, 3), (64, 128, 4, 4), (128, 128, 8, 3)]
SUM = [(64, 128, 4), (64, 64, 4), (32, 128, 4), (128, 64, 4), (32, 256, 4), (128, 128, 8)]


def microseconds(op: Callable[[], Any]) -> float:
    testing: Any = triton.testing
    op()
    return round(1e3 * testing.do_bench_cudagraph(op, rep=20, return_mode="median"), 1)


def made(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def cases(kind: str) -> Iterator[tuple[Any, Callable[[], Any]]]:
    """(settings, what to time under them)."""
    if kind == "sum":
        x, h, b = made(TOKENS, HIDDEN), made(TOKENS, RANK), made(HIDDEN, RANK)
        z = made(TOKENS, HIDDEN)
        for tile in SUM:
            low_rank_sum._ROWS, low_rank_sum._COLUMNS, low_rank_sum._WARPS = tile
            yield tile, lambda: low_rank_sum.low_rank_sum(x, h, b, 2.0, z)
        out = torch.empty_like(x)
        yield "h B^T alone", lambda: out.addmm_(h, b.t(), beta=0, alpha=2.0)
        yield "sum alone", lambda: x + out
        return
    if kind == "rank":
        widths = [HIDDEN, 1024, 1024]
        dy, h, b = made(TOKENS, sum(widths)), made(TOKENS, 3 * RANK), made(sum(widths), RANK)
        dh = torch.empty_like(h)
        given = dy, h, b, 2.0, dh, widths
        yield "products", lambda: rank_gradients.reference(*given)
        for tile, programs in itertools.product(RANK_TILES, (1, 2, 4)):
            rank_gradients._TILES, rank_gradients._PROGRAMS = (tile,), programs
            rank_gradients._division.cache_clear()
            yield (*tile, programs), lambda: rank_gradients.one_pass(*given)
        return
    gate, up = made(TOKENS, 2 * WIDTH).chunk(2, 1)
    both, dh, a = made(TOKENS, 2 * WIDTH + 32), made(TOKENS, RANK), made(RANK, WIDTH)
    d = both[:, WIDTH : 2 * WIDTH]
    h, b = made(TOKENS, 2 * RANK), made(WIDTH, RANK)
    adapters = h[:, :RANK], b, 2.0, h[:, RANK:], b, 2.0
    for tile, programs in itertools.product(
        FORWARD if kind == "forward" else BACKWARD,
        (8, 16, 24, 32) if kind == "backward" else (8, 16, 24),
    ):
        if kind == "forward":
            gated_lora._FORWARD = (*tile, programs)
            yield (*tile, programs), lambda: gated_lora.forward(gate, up, *adapters, a, "silu", 0)
        else:
            gated_lora._BACKWARD = (*tile, programs)
            yield (
                (*tile, programs),
                lambda: gated_lora.backward(d, gate, up, *adapters, a, dh, both, "silu"),
            )


def main() -> None:
    for kind in sys.argv[1:] or ["forward", "rank", "sum", "backward"]:
        found, end = [], time.monotonic() + BUDGET
        for settings, op in cases(kind):
            if time.monotonic() > end:
                print(f"{kind}: the rest was not timed, from {settings} on")
                break
            try:
                found.append((microseconds(op), settings))
            except Exception as error:  # noqa: BLE001 - a tile that does not fit is no tile
                print(f"{kind} {settings}: {repr(error)[:90]}")
        print(f"{kind}:", *sorted(found, key=lambda one: one[0])[:14], sep="\n    ", flush=True)


if __name__ == "__main__":
    main()
