"""How much work each row of a prepared split is: written with the rows, read before training."""

from __future__ import annotations

from pathlib import Path

import numpy as np

_NAME = "sizes.npy"


def write_sizes(directory: Path, split: str, sizes: np.ndarray) -> None:
    """Store the sizes of a split's rows beside its shards.

    Args:
        sizes: int64 [rows, 2]: tokens, and the sum of the squares of the sequences' lengths.
    """
    np.save(directory / split / _NAME, sizes.astype("<i8"), allow_pickle=False)


def read_sizes(directory: Path, split: str) -> np.ndarray | None:
    """The sizes of a split's rows, mapped; None for an artifact that was written without them."""
    path = Path(directory) / split / _NAME
    return np.load(path, mmap_mode="r", allow_pickle=False) if path.is_file() else None


def costs(sizes: np.ndarray, hidden_size: int) -> np.ndarray:
    """About the work of each row in tokens' worth of matrix products: float64 [rows].

    A layer's weights cost about 24 h^2 operations a token (attention 8 h^2, an MLP of 4 h 16 h^2);
    causal attention over n tokens costs 2 n^2 h (two products of 2 h each for half the pairs). So a
    sequence of n tokens costs n + n^2 / (12 h) (Narayanan et al. 2021, "Efficient large-scale
    language model training", appendix; halved for the causal mask).
    """
    return sizes[:, 0] + sizes[:, 1] / (12 * hidden_size)
