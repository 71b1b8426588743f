"""From `split` to ranges of rows: `train[:10%]+train[500:600]`."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from regrow.tasks.stage import StageError

_SPLIT = re.compile(r"(?P<name>[\w.-]+)(?:\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")


@dataclass(frozen=True)
class Rows:
    """A range of a dataset's rows: `train[10%:500]` and one of several shards of it."""

    start: str = ""
    """A row number, negative from the end, or a percentage with its sign; empty: the first row."""
    stop: str = ""
    """The same, exclusive; empty: after the last row."""
    skip: int = 0
    """Rows left out at the beginning."""
    shards: int = 1
    shard: int = 0

    def narrowed(self, skip: int, shards: int | None, index: int | None) -> Rows:
        """These rows without the first `skip`, and of them part `index` of `shards` parts."""
        return replace(self, skip=skip, shards=shards or 1, shard=index or 0)

    def bounds(self, total: int) -> tuple[int, int]:
        """(first row, row after the last) of a dataset of `total` rows."""
        low = min(_bound(self.start, total, 0) + self.skip, total)
        high = max(_bound(self.stop, total, total), low)
        size, larger = divmod(high - low, self.shards)
        first = low + size * self.shard + min(self.shard, larger)
        return first, first + size + (self.shard < larger)

    def limits(self) -> tuple[int, int | None]:
        """(first row, row after the last or None) where the total is not known: a stream.

        Only for rows counted from the beginning.
        """
        assert self.shards == 1, self
        stop = int(self.stop) if self.stop else None
        return int(self.start or 0) + self.skip, stop


def _bound(text: str, total: int, default: int) -> int:
    if not text:
        return default
    number = round(int(text[:-1]) * total / 100) if text.endswith("%") else int(text)
    return min(max(number + total if number < 0 else number, 0), total)


def parse_splits(text: str, key: str = "datasets.0") -> tuple[tuple[str, Rows], ...]:
    """The names and the rows of a split such as `train`, `train[:10%]`, `train[:9]+test[5:-5]`.

    Raises:
        StageError: for any other form.
    """
    found = []
    for part in text.split("+"):
        match = _SPLIT.fullmatch(part.strip())
        if match is None:
            raise StageError(
                f"{key}.split: {text!r} is not a split; write train, train[:10%], train[100:200] "
                "or several of these with + between them"
            )
        # From the first row and to the last is what is meant where nothing is said.
        start = "" if match["start"] in (None, "0", "0%") else match["start"]
        stop = "" if match["stop"] in (None, "100%") else match["stop"]
        found.append((match["name"], Rows(start, stop)))
    return tuple(found)
