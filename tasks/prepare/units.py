"""Source files to cached units of tokens: one unit for each slice of about 64 MB of a file.

A unit is found again as long as the slice, the format's options, the tokenizer and the template are
the same; packing, lengths and splits may change without tokenizing anything again.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pyarrow as pa

from regrow.tasks.prepare.localize import LocalFile, localize
from regrow.tasks.prepare.readers import Chunk, find_chunks
from regrow.tasks.prepare.spec import VERSION, DatasetSpec, SourceFile
from regrow.tasks.prepare.tokenize import Block, ChunkTask, RowEncoding, encode_chunk
from regrow.tasks.stage import StageError, UnitCache

UNIT_BYTES = 64 << 20
"""Source bytes of a unit: about 16 M tokens, half a minute of work on one core, so that little is
lost with an interrupted run, and few enough units that a store lists them at once."""

UNIT_FILE = "tokens.arrow"


@dataclass(frozen=True)
class Slice:
    """Some rows of one file: what one unit holds."""

    source: SourceFile
    chunks: tuple[Chunk, ...]
    low: int
    """First row number in the file."""
    high: int
    """One past the last."""

    @property
    def size(self) -> int:
        """Bytes to be read, about."""
        return sum(chunk.size for chunk in self.chunks)

    def __len__(self) -> int:
        """Rows."""
        return self.high - self.low


class Sources:
    """The files of a stage, brought here when they are first needed.

    Args:
        locations: sha256 -> place.
        scratch: directory for copies.
    """

    def __init__(self, locations: Mapping[str, str], scratch: Path, units: UnitCache) -> None:
        self._locations, self._scratch, self._units = locations, scratch, units
        self._local: dict[SourceFile, LocalFile] = {}

    def local(self, source: SourceFile) -> LocalFile:
        """The file, readable here. Raises StageError when it is not what was planned."""
        if source not in self._local:
            place = self._locations[source.sha256]
            self._local[source] = localize(place, source.sha256, source.kind, self._scratch)
        return self._local[source]

    def chunks(self, source: SourceFile) -> list[Chunk]:
        """The chunks of a file: looked up, so that a file all of whose units exist is not read."""

        def build(_out: Path) -> dict[str, Any]:
            found = find_chunks(self.local(source))
            return {"chunks": [list(asdict(chunk).values()) for chunk in found]}

        _, result, _ = self._units.get_or_build("chunks", VERSION, source, build)
        return [Chunk(*numbers) for numbers in result["chunks"]]

    def slices(self, dataset: DatasetSpec) -> list[Slice]:
        """The slices of those rows that a dataset uses, in order."""
        per_file = [self.chunks(source) for source in dataset.files]
        rows = [sum(chunk.rows for chunk in chunks) for chunks in per_file]
        low, high = dataset.rows.bounds(sum(rows))
        firsts = [0, *itertools.accumulate(rows)]
        slices: list[Slice] = []
        for source, chunks, first in zip(dataset.files, per_file, firsts, strict=False):
            slices += _slices(source, chunks, low - first, high - first)
        return slices


def _slices(source: SourceFile, chunks: Sequence[Chunk], low: int, high: int) -> Iterator[Slice]:
    """Groups of about `UNIT_BYTES`; where they begin does not depend on the rows that are used."""
    ends = itertools.accumulate(chunk.size for chunk in chunks)
    numbered = [((end - 1) // UNIT_BYTES, chunk) for end, chunk in zip(ends, chunks, strict=True)]
    for _, group in itertools.groupby(numbered, key=lambda pair: pair[0]):
        its = [chunk for _, chunk in group]
        begin, end = its[0].first_row, its[-1].first_row + its[-1].rows
        first, last = max(low, begin), min(high, end)
        used = [c for c in its if c.first_row < last and c.first_row + c.rows > first]
        if used:
            yield Slice(source, tuple(used), first, last)


@dataclass(frozen=True)
class Unit:
    """A slice's tokens, on disk."""

    path: Path
    """An Arrow file, one record batch for each chunk."""
    examples: int
    tokens: int
    unended: int


class Tokenizing:
    """Builds units. A context manager.

    Args:
        identity: what of the tokenizer enters a unit's key.
        num_proc: 1 means this process; more are started when the first unit has to be built.
    """

    def __init__(self, units: UnitCache, sources: Sources, identity: Any, num_proc: int) -> None:
        self._units, self._sources, self._identity = units, sources, identity
        self._num_proc = num_proc
        self._stack = ExitStack()

    def __enter__(self) -> Tokenizing:
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.close()

    def unit(self, part: Slice, encoding: RowEncoding, told: Callable[[int], None]) -> Unit:
        """The unit of a slice, built now if it is not there.

        Args:
            told: called with the number of rows that have just been done.
        """
        spec = {
            "source": part.source,
            "rows": [part.low, part.high],
            "format": encoding.format,
            "options": encoding.options,
            "template": encoding.template,
            "tokenizer": self._identity,
        }

        def build(out: Path) -> dict[str, Any]:
            file = self._sources.local(part.source)
            tasks = [ChunkTask(encoding, file, c, part.low, part.high) for c in part.chunks]
            try:
                return _write_unit(self._encoded(tasks, told), out / UNIT_FILE)
            except BrokenProcessPool as error:
                raise StageError(
                    "a tokenizing process was killed, most likely for want of memory. Set "
                    f"`dataset_num_proc` lower than {self._num_proc}, or run again"
                ) from error

        path, result, built = self._units.get_or_build("tokens", VERSION, spec, build)
        if not built:
            told(len(part))
        return Unit(path / UNIT_FILE, result["examples"], result["tokens"], result["unended"])

    def _encoded(self, tasks: list[ChunkTask], told: Callable[[int], None]) -> Iterator[Block]:
        blocks: Iterable[Block] = map(encode_chunk, tasks)
        if self._num_proc > 1:
            blocks = self._processes.map(encode_chunk, tasks)
        for task, block in zip(tasks, blocks, strict=True):
            chunk = task.chunk
            end = min(task.high, chunk.first_row + chunk.rows)
            told(end - max(task.low, chunk.first_row))
            yield block

    @cached_property
    def _processes(self) -> Executor:
        # spawn: a forked child of a process with threads (Prefect, Arrow) may hang.
        pool = ProcessPoolExecutor(self._num_proc, mp_context=get_context("spawn"))
        self._stack.callback(pool.shutdown, cancel_futures=True)
        return pool


_SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("loss_mask", pa.list_(pa.uint8())),
        ("supervised", pa.int32()),
        ("prompt_len", pa.int32()),
        ("digest", pa.uint64()),
    ]
)


def _write_unit(blocks: Iterator[Block], path: Path) -> dict[str, Any]:
    """Blocks as they come, not compressed: packing reads examples from all over the file."""
    examples = tokens = unended = 0
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
        for block in blocks:
            writer.write_batch(_record_batch(block))
            examples, tokens = examples + len(block), tokens + len(block.input_ids)
            unended += block.unended
    return {"examples": examples, "tokens": tokens, "unended": unended}


def _record_batch(block: Block) -> pa.RecordBatch:
    offsets = pa.array([0, *itertools.accumulate(block.lengths.tolist())], pa.int32())
    return pa.RecordBatch.from_arrays(
        [
            pa.ListArray.from_arrays(offsets, pa.array(block.input_ids)),
            pa.ListArray.from_arrays(offsets, pa.array(block.loss_mask)),
            pa.array(block.supervised),
            pa.array(block.prompt_lens),
            pa.array(block.digests),
        ],
        schema=_SCHEMA,
    )
