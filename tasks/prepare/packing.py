"""Which examples share a row: two ways to fill rows over the whole split; the fewer rows win.

Best-fit decreasing (Johnson 1973, "Near-optimal bin packing algorithms") puts each example, longest
first, into the row with the least room that takes it; with many lengths, short ones among them, it
leaves next to nothing empty. Where lengths are alike it cannot fill the ends of rows; there, rows
are filled one by one and closed with one or two examples that fit exactly. Both work on how many
examples there are of each length, so a million take seconds. Nothing is random, nothing is cut.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Best-fit within a thousandth of the least possible number of rows is not worth a second try.
_GOOD_ENOUGH = 1.001
_ROWS_AT_ONCE = 1 << 16  # a few megabytes, however many rows there are


@dataclass(frozen=True)
class Packs:
    """Items grouped in rows."""

    items: np.ndarray
    """int64 [items]: item numbers, row after row."""
    offsets: np.ndarray
    """int64 [rows + 1]: where each row begins in `items`."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, index: int) -> np.ndarray:
        """The item numbers of a row."""
        return self.items[self.offsets[index] : self.offsets[index + 1]]

    def first_items(self) -> np.ndarray:
        """int64 [rows]: the lowest item number of each row."""
        return np.minimum.reduceat(self.items, self.offsets[:-1]) if len(self) else self.items


def one_each(count: int) -> Packs:
    """Every item in a row of its own."""
    return Packs(np.arange(count), np.arange(count + 1))


def in_order(lengths: np.ndarray, capacity: int) -> Packs:
    """Rows of at most `capacity` tokens, filled with the items one after the other."""
    ends = np.cumsum(lengths, dtype=np.int64)
    offsets = [0]
    while offsets[-1] < len(lengths):
        full = (ends[offsets[-1] - 1] if offsets[-1] else 0) + capacity
        offsets.append(int(np.searchsorted(ends, full, side="right")))
        assert offsets[-1] > offsets[-2], "an example longer than a row"
    return Packs(np.arange(len(lengths)), np.array(offsets, np.int64))


def row_sizes(lengths: np.ndarray, packs: Packs) -> np.ndarray:
    """int64 [rows, 2]: what `modeling.row_sizes` stores of each row.

    Args:
        lengths: [items, sequences] in tokens; or [items], where each is one sequence.
    """
    lengths = lengths.reshape(len(lengths), -1)
    found = np.empty((len(packs), 2), np.int64)
    for first in range(0, len(packs), _ROWS_AT_ONCE):
        edges = packs.offsets[first : first + _ROWS_AT_ONCE + 1]
        its = lengths[packs.items[edges[0] : edges[-1]]].astype(np.int64)
        for column, values in enumerate((its, its**2)):
            sums = np.add.reduceat(values.sum(axis=1), edges[:-1] - edges[0])
            found[first : first + len(sums), column] = sums
    return found


def pack(lengths: np.ndarray, capacity: int) -> Packs:
    """Rows of at most `capacity` tokens; within a row items stand in ascending order.

    Args:
        lengths: [items] in tokens, each from 1 to `capacity`.
    """
    if not len(lengths):
        return one_each(0)
    assert lengths.min() >= 1, "an example of no tokens"
    assert lengths.max() <= capacity, "an example longer than a row"
    row_of = best_fit_decreasing(lengths, capacity)
    least = lengths.sum(dtype=np.int64) / capacity
    if row_of.max() + 1 > least * _GOOD_ENOUGH:
        closed = exactly_closed(lengths, capacity)
        row_of = closed if closed.max() < row_of.max() else row_of
    offsets = np.concatenate([[0], np.cumsum(np.bincount(row_of))])
    return Packs(np.argsort(row_of, kind="stable"), offsets)


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """int64 [items]: the row of each item."""
    longest_first = np.argsort(-lengths.astype(np.int64), kind="stable")
    sizes, counts = np.unique(lengths, return_counts=True)
    row_of = np.empty(len(lengths), np.int64)
    rows = _OpenRows(capacity)
    at = 0
    for size, count in zip(sizes[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while count:
            taken, each = rows.best_fitting(size, count)
            placed = min(count, each * len(taken))
            row_of[longest_first[at : at + placed]] = np.repeat(taken, each)[:placed]
            at, count = at + placed, count - placed
    return row_of


class _OpenRows:
    """Rows with room left, grouped by how much."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._rooms: list[int] = []
        """Rooms that some row has, ascending."""
        self._rows: dict[int, list[int]] = {}
        self._opened = 0

    def best_fitting(self, size: int, count: int) -> tuple[Sequence[int], int]:
        """Rows for up to `count` items of one size, and how many go into each (at most: the last).

        All the rows have the same room, the least that takes an item. Each is filled with as many
        as it takes before the next, which is what placing the items one by one would do.
        """
        index = bisect_left(self._rooms, size)
        room = self._rooms[index] if index < len(self._rooms) else self._capacity
        each = room // size
        needed = -(-count // each)
        taken = self._take(index, needed) if index < len(self._rooms) else self._open(needed)
        full, rest = divmod(min(count, each * len(taken)), each)
        self._put(room - each * size, taken[:full])
        if rest:
            self._put(room - rest * size, taken[full:])
        return taken, each

    def _open(self, count: int) -> list[int]:
        self._opened += count
        return list(range(self._opened - count, self._opened))

    def _take(self, index: int, count: int) -> list[int]:
        rows = self._rows[self._rooms[index]]
        taken = rows[-count:]
        del rows[-count:]
        if not rows:
            del self._rows[self._rooms.pop(index)]
        return taken

    def _put(self, room: int, rows: list[int]) -> None:
        if not room or not rows:
            return
        if room not in self._rows:
            self._rows[room] = []
            insort(self._rooms, room)
        self._rows[room].extend(rows)


def exactly_closed(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """int64 [items]: the row of each item; rows are filled longest first and closed exactly."""
    left = np.bincount(lengths, minlength=capacity + 1)
    by_length = np.argsort(lengths, kind="stable")
    next_of = np.cumsum(left) - left
    sizes = np.flatnonzero(left)
    row_of = np.empty(len(lengths), np.int64)
    row = 0
    while len(sizes):
        content = _one_row(left, sizes, capacity)
        # Rows of the same lengths as often as there are examples for them.
        times = min(int(left[size]) // many for size, many in content.items())
        for size, many in content.items():
            used = by_length[next_of[size] : next_of[size] + many * times]
            row_of[used] = np.repeat(np.arange(row, row + times), many)
            next_of[size] += many * times
            left[size] -= many * times
        sizes = sizes[left[sizes] > 0]
        row += times
    return row_of


def _one_row(left: np.ndarray, sizes: np.ndarray, capacity: int) -> Counter[int]:
    """Lengths for one row: the longest, until one or two that are left fill it exactly.

    Args:
        left: [capacity + 1] how many examples there are of each length; changed, and put back.
        sizes: the lengths of which there are any, ascending.
    """
    content, room, top = Counter[int](), capacity, len(sizes) - 1
    while top >= 0:
        size = int(sizes[top])
        if size > room:
            top = int(np.searchsorted(sizes, room, side="right")) - 1
        elif not left[size]:
            top -= 1
        else:
            for chosen in _closing(left, sizes[: top + 1], room) or (size,):
                left[chosen] -= 1
                content[chosen] += 1
                room -= chosen
    for size, many in content.items():
        left[size] += many
    return content


def _closing(left: np.ndarray, sizes: np.ndarray, room: int) -> tuple[int, ...] | None:
    """One length, or two, that fill the room exactly; None when there are none."""
    longest = int(sizes[-1])
    if room > 2 * longest:
        return None
    if left[room]:
        return (room,)
    sizes = sizes[np.searchsorted(sizes, room - longest) :]
    others = room - sizes
    enough = np.where(others == sizes, left[sizes] > 1, (left[sizes] > 0) & (left[others] > 0))
    paired = sizes[enough]
    return (int(paired[-1]), room - int(paired[-1])) if len(paired) else None
