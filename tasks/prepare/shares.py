"""How much of each stream is read: what training needs, shared out by the datasets' weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from regrow.tasks.prepare.examples import Examples
from regrow.tasks.prepare.spec import PrepareSpec


def needed(spec: PrepareSpec) -> int:
    """Tokens that fill the rows of a stream; examples, where each has a row of its own."""
    assert spec.stream_rows is not None
    return spec.stream_rows * (spec.capacity if spec.sample_packing else 1)


def amounts(spec: PrepareSpec, examples: Examples, datasets: int) -> list[int]:
    """Tokens, or examples, of each dataset."""
    size = examples.length if spec.sample_packing else None
    counted = np.bincount(examples.dataset, size, minlength=datasets)
    return [int(count) for count in counted]


def goal(read: int, have: int, share: int) -> int:
    """How much to have read so that `share` of it can be used, going by what could be so far.

    Args:
        read: tokens or examples that have been read.
        have: how many of them can be used.
    """
    return read + math.ceil(max(share - have, 0) * read / max(have, 1))


def first_of(spec: PrepareSpec, examples: Examples, shares: Sequence[int]) -> np.ndarray:
    """Which examples make up each dataset's share, in the order of the stream: bool [examples]."""
    kept = np.full(len(examples), False)
    for dataset, share in enumerate(shares):
        its = np.flatnonzero(examples.dataset == dataset)
        size = examples.length[its] if spec.sample_packing else np.ones(len(its), np.int64)
        before = np.cumsum(size, dtype=np.int64) - size
        kept[its[before < share]] = True
    return kept


def allotted(total: int, weights: Sequence[float], most: Sequence[int | None]) -> list[int]:
    """`total` shared out by weight, none getting more than its most; others get what it leaves."""
    found = [0] * len(weights)
    sharing, left = list(range(len(weights))), total
    while sharing:
        whole = sum(weights[i] for i in sharing)
        for i in sharing:
            found[i] = math.ceil(left * weights[i] / whole)
        limits = {i: limit for i in sharing if (limit := most[i]) is not None}
        full = [i for i, limit in limits.items() if limit <= found[i]]
        if not full:
            break
        for i in full:
            found[i] = limits[i]
            left = max(left - limits[i], 0)
        sharing = [i for i in sharing if i not in full]
    return found
