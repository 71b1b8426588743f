"""Which processes read which rows: those that share a row read the same one, all others not."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from regrow.tasks.modeling.rows import PackedRows
from regrow.tasks.train.loader import FileOrder, MicroBatches
from regrow.tasks.train.order import DataOrder, Split
from regrow.tasks.train.sharding import Sharding


@dataclass(frozen=True)
class Reader:
    """This process among those that read rows."""

    rank: int
    """Of its group, among `count` groups that read different rows."""
    count: int
    context: tuple[int, int] = (0, 1)
    """(rank, number) among the processes that share each row."""
    counts: bool = True
    """Whether this process counts the tokens that it reads: one of those that read the same."""
    multiple_of: int = 1
    """Tokens of what a process computes are padded to a multiple of it."""

    @classmethod
    def of(cls, sharding: Sharding, rank: int, processes: int, multiple_of: int = 1) -> Reader:
        """Neighbours in rank share rows: they are on one machine first."""
        size, copies = sharding.context_parallel_size, sharding.tensor_parallel_size
        group, within = divmod(rank, size * copies)
        context = (within // copies, size)
        return cls(group, processes // (size * copies), context, within == 0, multiple_of)

    def training(
        self,
        rows: PackedRows,
        order: DataOrder,
        split: Split,
        steps: int,
        pad_to: int | None,
        done: int,
    ) -> MicroBatches:
        """The micro-batches of a training of so many steps, of which some are done."""
        return MicroBatches(
            rows,
            order,
            split,
            self.rank,
            steps,
            pad_to,
            done,
            self.multiple_of,
            self.context,
            self.counts,
        )

    def validation(self, prepared: Path, micro_batch_size: int, pad_to: int | None) -> MicroBatches:
        """Those of the validation split, each row once."""
        rows = PackedRows(prepared, "validation")
        order = FileOrder(len(rows), micro_batch_size * self.count)
        split = Split(self.count, micro_batch_size, accumulation=1)
        return MicroBatches(
            rows,
            order,
            split,
            self.rank,
            order.steps,
            pad_to,
            multiple_of=self.multiple_of,
            context=self.context,
            counts=self.counts,
        )


def validates(prepared: Path) -> bool:
    """Whether there are rows to validate on."""
    splits = json.loads((prepared / "index.json").read_text())["splits"]
    return bool(splits.get("validation", {}).get("rows"))
