"""Packed rows read back from a prepared artifact: what train and evaluate feed on. Torch-free."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from regrow.tasks.stage import StageError

SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("loss_mask", pa.list_(pa.uint8())),
        ("seq_lens", pa.list_(pa.int32())),
    ]
)
"""Columns of a shard."""


@dataclass(frozen=True)
class Row:
    """One pack: several examples, one after the other, without padding."""

    input_ids: np.ndarray
    """int32 [T]."""
    loss_mask: np.ndarray
    """uint8 [T]: 1 where the token is a target to be learnt; never the first of an example."""
    seq_lens: np.ndarray
    """int32 [examples]: their lengths; they add up to T."""


class PackedRows:
    """The rows of one split, by number, mapped from the shards.

    Rows are compressed in groups; the last group read is kept, so reading in order is fast. An
    object may be pickled: the copy opens the files anew.

    Args:
        directory: a prepared artifact.
        split: "train" or "validation".

    Raises:
        StageError: when the artifact has no such split.
    """

    def __init__(self, directory: Path, split: str) -> None:
        self._directory, self._split = Path(directory), split
        index = json.loads((self._directory / "index.json").read_text())["splits"]
        if split not in index:
            raise StageError(
                f"{directory} has no {split} split; it has {', '.join(index)}. "
                "Set `val_set_size` or `test_datasets` for a validation split"
            )
        entry = index[split]
        self.examples: int = entry["examples"]
        self.tokens: int = entry["tokens"]
        self.supervised_tokens: int = entry["supervised_tokens"]
        self._files = [self._directory / shard["file"] for shard in entry["shards"]]
        self._ends = np.cumsum([shard["rows"] for shard in entry["shards"]], dtype=np.int64)
        self._readers: dict[int, tuple[Any, int]] = {}
        self._group: tuple[int, int] | None = None
        self._columns: tuple[tuple[np.ndarray, np.ndarray], ...] = ()

    @staticmethod
    def has(directory: Path, split: str) -> bool:
        """Whether the artifact has that split."""
        return split in json.loads((Path(directory) / "index.json").read_text())["splits"]

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> Row:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        index %= len(self)
        shard = int(np.searchsorted(self._ends, index, side="right"))
        first = int(self._ends[shard - 1]) if shard else 0
        reader, group_rows = self._reader(shard)
        group, row = divmod(index - first, group_rows)
        if self._group != (shard, group):
            batch = reader.get_batch(group)
            self._columns = tuple(_column(batch.column(name)) for name in SCHEMA.names)
            self._group = (shard, group)
        return Row(*(values[at[row] : at[row + 1]] for values, at in self._columns))

    def __reduce__(self) -> tuple[Any, ...]:
        return PackedRows, (self._directory, self._split)

    def _reader(self, shard: int) -> tuple[Any, int]:
        """The open file and the rows of each of its groups (the last may have fewer)."""
        if shard not in self._readers:
            reader = pa.ipc.open_file(pa.memory_map(str(self._files[shard])))
            self._readers[shard] = reader, reader.get_batch(0).num_rows
        return self._readers[shard]


def _column(column: pa.ListArray) -> tuple[np.ndarray, np.ndarray]:
    return column.values.to_numpy(), column.offsets.to_numpy()
