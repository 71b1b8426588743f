"""How full packed rows are, how long packing takes, and how evenly steps are shared out over ranks.

    python tests/bench/prepare_packing.py [--lengths 1000000] [--median 400] [--ranks 8]

Lengths are lognormal. Prints a table of packing (one core) and one of the work of the slowest rank
against the mean of all at each micro-step, before and after rows are assigned by attention cost.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from regrow.tasks.modeling.row_sizes import costs
from regrow.tasks.prepare.packing import Packs, pack, row_sizes
from regrow.tasks.train.order import DataOrder, Split, choose_split

CAPACITIES = (2048, 8192, 32768, 131072)
SIGMAS = (0.8, 1.0, 1.5)
HIDDEN_SIZE = 4096  # of a 7B model


def drawn(count: int, median: float, sigma: float, capacity: int) -> np.ndarray:
    """Lognormal lengths that fit into a row."""
    lengths = np.random.default_rng(0).lognormal(np.log(median), sigma, count).astype(int) + 1
    return lengths[lengths <= capacity]


def packed(lengths: np.ndarray, capacity: int) -> tuple[Packs, float]:
    """The packs, and seconds of one core."""
    begin = time.process_time()
    packs = pack(lengths, capacity)
    return packs, time.process_time() - begin


def slowest(split: Split, order: DataOrder, work: np.ndarray) -> float:
    """Work of the slowest rank at each micro-step by the mean of all ranks, on average."""
    found = []
    for step in range(min(order.steps_per_epoch - 1, 40)):
        rows = order.rows(step)
        for micro in range(split.accumulation):
            parts = [split.rows(rows, rank, micro) for rank in range(split.world_size)]
            each = [work[part].sum() for part in parts]
            found.append(max(each) / np.mean(each))
    return float(np.mean(found))


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, default=1_000_000)
    parser.add_argument("--median", type=float, default=400)
    parser.add_argument("--ranks", type=int, default=8)
    options = parser.parse_args()
    print("sigma  capacity  examples      rows     fill  seconds")
    for sigma in SIGMAS:
        for capacity in CAPACITIES:
            lengths = drawn(options.lengths, options.median, sigma, capacity)
            packs, seconds = packed(lengths, capacity)
            fill = lengths.sum() / (len(packs) * capacity)
            row = f"{len(lengths):9}  {len(packs):8}  {fill:7.3%}  {seconds:7.2f}"
            print(f"{sigma:5}  {capacity:8}  {row}")
    print(f"\nslowest of {options.ranks} ranks / mean, sigma 1.5: as they come, by cost")
    for capacity in CAPACITIES:
        lengths = drawn(options.lengths, options.median, 1.5, capacity)
        packs, _ = packed(lengths, capacity)
        work = costs(row_sizes(lengths, packs), HIDDEN_SIZE)
        for micro in (1, 2):
            batch = options.ranks * micro * 4
            order = DataOrder(len(packs), batch, seed=0)
            plain, even = (choose_split(batch, micro, options.ranks, c) for c in (None, work))
            before, after = (slowest(split, order, work) for split in (plain, even))
            print(f"{capacity:8}  micro-batch {micro}  {before:.3f}  {after:.3f}")


if __name__ == "__main__":
    main()
