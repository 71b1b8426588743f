"""The items of a split as a table over the units' bytes, which are read when they are needed.

In memory are 34 bytes for each item (42 for pairs), and nothing else here that grows with the
corpus: tokens stay on disk and are read with pread, since mapped pages would count as memory of the
process and stay until something else needs them. From 20,000 examples to 400,000 the peak of
choosing, packing and writing grew from 146 to 172 MB (measured, tests/.../test_shards.py).
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa

from regrow.tasks.prepare.units import Unit


@dataclass(frozen=True)
class Examples:
    """One line for each item (or piece of one); all arrays have the same length."""

    dataset: np.ndarray
    """int16: which of the spec's datasets."""
    block: np.ndarray
    """int32: which of the corpus's blocks."""
    item: np.ndarray
    """int32: which item of the block."""
    start: np.ndarray
    """int32: first token in the block."""
    length: np.ndarray
    """int32: tokens, those of both sequences where there are two."""
    supervised: np.ndarray
    """int32: tokens that are learnt."""
    prompt_len: np.ndarray
    """int32: tokens before the answer, 0 when there is none."""
    digest: np.ndarray
    """uint64: of the whole item, also for a piece of one."""
    first: np.ndarray | None = None
    """int32: tokens of the first sequence of a pair; None where items have one sequence."""
    second_start: np.ndarray | None = None
    """int32: first token of the second sequence in the block."""

    def __len__(self) -> int:
        return len(self.length)

    def take(self, which: np.ndarray) -> Examples:
        """Those lines (numbers or a boolean mask), in that order."""
        if which.dtype == bool and which.all():
            return self
        columns = {column.name: getattr(self, column.name) for column in fields(self)}
        taken = {name: its[which] for name, its in columns.items() if its is not None}
        return Examples(**taken)

    def place(self, index: int) -> tuple[int, int, int]:
        """(block, start, length): what `Corpus.tokens` takes. Not for pairs."""
        return int(self.block[index]), int(self.start[index]), int(self.length[index])

    @property
    def longest(self) -> np.ndarray:
        """int32: tokens of the longer sequence of each item."""
        if self.first is None:
            return self.length
        return np.maximum(self.first, self.length - self.first)

    @property
    def sequences(self) -> int:
        """How many there are in all: two for each pair."""
        return len(self) * (1 if self.first is None else 2)

    @property
    def sequence_lens(self) -> np.ndarray:
        """int32 [sequences]: their lengths, of a pair one after the other."""
        if self.first is None:
            return self.length
        return np.stack([self.first, self.length - self.first], axis=1).ravel()

    @property
    def sequence_places(self) -> tuple[np.ndarray, np.ndarray]:
        """(block, start) of each sequence: int32 [sequences]."""
        if self.first is None or self.second_start is None:
            return self.block, self.start
        starts = np.stack([self.start, self.second_start], axis=1).ravel()
        return np.repeat(self.block, 2), starts

    @property
    def tokens(self) -> int:
        """In all."""
        return int(self.length.sum(dtype=np.int64))

    @property
    def supervised_tokens(self) -> int:
        """In all."""
        return int(self.supervised.sum(dtype=np.int64))


_COLUMNS = (np.int16, np.int32, np.int32, np.int32, np.int32, np.int32, np.int32, np.uint64)


@dataclass(frozen=True)
class _Values:
    """A list column of a block, in its file."""

    offsets_at: int
    """Byte at which the list's int32 offsets begin."""
    values_at: int
    item_bytes: int

    @classmethod
    def of(cls, column: Any, beginning: int) -> _Values:
        """Of a column whose file is mapped at address `beginning`."""
        assert column.offset == 0, "a slice of a column"
        if pa.types.is_string(column.type):
            _, offsets, values = column.buffers()
            item_bytes = 1
        else:
            _, offsets, _, values = column.buffers()
            item_bytes = column.type.value_type.bit_width // 8
        offsets_at, values_at = (
            0 if buffer is None else buffer.address - beginning for buffer in (offsets, values)
        )
        return cls(offsets_at, values_at, item_bytes)


@dataclass(frozen=True)
class _Block:
    """One record batch of a unit."""

    file: Path
    input_ids: _Values
    loss_mask: _Values
    labels: _Values
    extra: _Values


class Corpus:
    """The tokens of some units, read from their files.

    Args:
        units: (number of the dataset, unit) in order.
    """

    def __init__(self, units: Sequence[tuple[int, Unit]]) -> None:
        self._units = units
        self._files = _OpenFiles()
        self._blocks: list[_Block] = []
        for _, unit in units:
            reader, beginning = _mapped(unit.path)
            batches = map(reader.get_batch, range(reader.num_record_batches))
            self._blocks += [_block(unit.path, batch, beginning) for batch in batches]

    @property
    def examples(self) -> Examples:
        """All items, in the order of the sources.

        Read from the units each time (0.01 s for 100,000), so that the table is not in memory while
        a part of it is worked with.
        """
        count = sum(unit.examples for _, unit in self._units)
        columns = [np.empty(count, dtype) for dtype in _COLUMNS]
        pairs = [np.empty(0, np.int32)] * 2
        at = block = 0
        for dataset, unit in self._units:
            reader, _ = _mapped(unit.path)
            for number in range(reader.num_record_batches):
                batch = reader.get_batch(number)
                part = _lines(batch, dataset, block)
                block += 1
                end = at + batch.num_rows
                for whole, its in zip(columns, part, strict=False):
                    whole[at:end] = its
                if len(part) > len(columns):
                    pairs = pairs if len(pairs[0]) else [np.zeros(count, np.int32) for _ in "12"]
                    for whole, its in zip(pairs, part[len(columns) :], strict=True):
                        whole[at:end] = its
                at = end
        assert at == count, "a unit holds other items than it says"
        first, second_start = pairs if len(pairs[0]) else (None, None)
        names = (column.name for column in fields(Examples))
        table = dict(zip(names, columns, strict=False))
        return Examples(**table, first=first, second_start=second_start)

    def tokens(self, block: int, start: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """(input_ids, loss_mask) of a sequence; of a piece, the first token is not learnt."""
        ids, mask = np.empty(length, np.int32), np.empty(length, np.uint8)
        self.gather(np.array([block]), np.array([start]), np.array([length]), ids, mask)
        return ids, mask

    def gather(
        self,
        blocks: np.ndarray,
        starts: np.ndarray,
        lengths: np.ndarray,
        input_ids: np.ndarray,
        loss_mask: np.ndarray,
    ) -> None:
        """Read sequences, one after the other, into `input_ids` int32 and `loss_mask` uint8."""
        ids, mask = input_ids.view(np.uint8).data, loss_mask.data
        read, at = os.preadv, 0
        places = zip(blocks.tolist(), starts.tolist(), lengths.tolist(), strict=True)
        for number, start, length in places:
            block, end = self._blocks[number], at + length
            file = self._files.get(block.file)
            got = read(file, [ids[4 * at : 4 * end]], block.input_ids.values_at + 4 * start)
            got += read(file, [mask[at:end]], block.loss_mask.values_at + start)
            assert got == 5 * length, f"{block.file} is cut short"
            at = end

    def labels(self, block: int, item: int) -> np.ndarray:
        """uint8: the labels of an item; none where the kind has none."""
        its = self._blocks[block]
        return np.frombuffer(self._read(its.file, its.labels, item), np.uint8)

    def extra(self, block: int, item: int) -> str:
        """What travels with an item unread; empty where there is nothing."""
        its = self._blocks[block]
        return self._read(its.file, its.extra, item).decode()

    def _read(self, path: Path, values: _Values, item: int) -> bytes:
        file = self._files.get(path)
        begin, end = np.frombuffer(os.pread(file, 8, values.offsets_at + 4 * item), np.int32)
        if begin == end:
            return b""
        size = values.item_bytes
        return os.pread(file, int(end - begin) * size, values.values_at + int(begin) * size)

    def counted(self, examples: Examples, which: np.ndarray) -> Examples:
        """The examples with `supervised` counted anew for those numbers."""
        supervised = examples.supervised.copy()
        for i in which.tolist():
            one = examples.take(np.array([i]))
            (blocks, starts), lengths = one.sequence_places, one.sequence_lens
            parts = zip(blocks.tolist(), starts.tolist(), lengths.tolist(), strict=True)
            supervised[i] = sum(int(self.tokens(*part)[1][1:].sum()) for part in parts)
        return replace(examples, supervised=supervised)


class _OpenFiles:
    """File descriptors of the files used last."""

    _LIMIT = 256  # of the 1024 that a process may have open by default on Linux

    def __init__(self) -> None:
        self._open: OrderedDict[Path, int] = OrderedDict()

    def get(self, path: Path) -> int:
        """The descriptor of a file, opened now if it is not."""
        if path not in self._open:
            if len(self._open) >= self._LIMIT:
                os.close(self._open.popitem(last=False)[1])
            self._open[path] = os.open(path, os.O_RDONLY)
        self._open.move_to_end(path)
        return self._open[path]

    def __del__(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)


def _mapped(path: Path) -> tuple[Any, int]:
    """A unit's reader and the address at which its file is mapped, as long as the reader lives."""
    mapped = pa.memory_map(str(path))
    whole = mapped.read_buffer()
    mapped.seek(0)
    return pa.ipc.open_file(mapped), whole.address


def _block(path: Path, batch: pa.RecordBatch, beginning: int) -> _Block:
    names = ("input_ids", "loss_mask", "labels", "extra")
    return _Block(path, *(_Values.of(batch.column(name), beginning) for name in names))


def _lines(batch: pa.RecordBatch, dataset: int, block: int) -> list[np.ndarray]:
    """The columns of `Examples` for a batch, in their order; the last two only for pairs."""
    count = batch.num_rows
    ends = _offsets(batch, "input_ids")
    columns = [
        np.full(count, dataset, np.int16),
        np.full(count, block, np.int32),
        np.arange(count, dtype=np.int32),
        ends[:-1],
        np.diff(ends),
        *(batch.column(name).to_numpy() for name in ("supervised", "prompt_len", "digest")),
    ]
    sequences = _offsets(batch, "seq_lens")
    if count and sequences[-1] == 2 * count:
        first = cast(pa.ListArray, batch.column("seq_lens")).values.to_numpy()[::2]
        return [*columns, first, ends[:-1] + first]
    assert sequences[-1] == count, "an item has one sequence or two, as all others of its kind"
    return columns


def _offsets(batch: pa.RecordBatch, name: str) -> np.ndarray:
    return cast(pa.ListArray, batch.column(name)).offsets.to_numpy()
