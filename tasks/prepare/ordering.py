"""Seeded orders that are the same on every machine, with every library version, for ever.

numpy promises no stream of random numbers across versions (NEP 19); a mixed counter needs none.
"""

from __future__ import annotations

import numpy as np

# splitmix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators", figure 15).
_STEP = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)


def mixed(values: np.ndarray, seed: int) -> np.ndarray:
    """A 64-bit number for each value that looks random and depends on value and seed alone.

    Args:
        values: non-negative integers, any shape.
    """
    start = _mix(np.array([seed % 2**64], np.uint64))
    return _mix(values.astype(np.uint64) ^ start)


def shuffled(count: int, seed: int) -> np.ndarray:
    """A permutation of range(count)."""
    return np.argsort(mixed(np.arange(count), seed), kind="stable")


def shuffled_within(groups: np.ndarray, seed: int) -> np.ndarray:
    """The numbers 0 to n - 1 group after group, those of each group mixed.

    Args:
        groups: [n] which group each number is in.
    """
    return np.lexsort((mixed(np.arange(len(groups)), seed), groups))


def _mix(state: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is meant
        state = state + _STEP
        state = (state ^ (state >> np.uint64(30))) * _FIRST
        state = (state ^ (state >> np.uint64(27))) * _SECOND
    return state ^ (state >> np.uint64(31))
