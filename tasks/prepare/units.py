"""Source files to cached units of tokens: one unit for each slice of about 64 MB of a file.

A unit is found again as long as the slice, the format's options, the tokenizer and the template are
the same; packing, lengths and splits may change without tokenizing anything again.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from regrow.tasks.prepare.chunk_pool import ChunkPool, Locks, all_of
from regrow.tasks.prepare.localize import LocalFile, localize
from regrow.tasks.prepare.readers import Chunk, find_chunks
from regrow.tasks.prepare.spec import VERSION, DatasetSpec, Part, SourceFile
from regrow.tasks.prepare.tokenize import Block, ChunkTask, RowEncoding, encode_chunk
from regrow.tasks.prepare.unit_files import UNIT_FILE, write_unit
from regrow.tasks.stage import StageError, UnitCache, fingerprint

UNIT_BYTES = 64 << 20
"""Source bytes of a unit: about 16 M tokens, half a minute of work on one core, so that little is
lost with an interrupted run, and few enough units that a store lists them at once."""

_UNITS_AT_ONCE = 8
"""Each has an open file and waits for a store now and then."""

Told = Callable[[int, int], None]
"""Takes rows and tokens."""


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
        self._locks = Locks()

    def local(self, source: SourceFile) -> LocalFile:
        """The file, readable here. Raises StageError when it is not what was planned."""
        with self._locks.of(source.sha256 + source.kind):
            known = self._local.get(source)
            # Of a stream only the piece in work is kept: another dataset may need an earlier one.
            if known is None or not Path(known.path).is_file():
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
        return [piece for part in dataset.parts for piece in self._of_part(part)]

    def _of_part(self, part: Part) -> Iterator[Slice]:
        per_file = [self.chunks(source) for source in part.files]
        rows = [sum(chunk.rows for chunk in chunks) for chunks in per_file]
        low, high = part.rows.bounds(sum(rows))
        firsts = itertools.accumulate(rows, initial=0)
        for source, chunks, first in zip(part.files, per_file, firsts, strict=False):
            yield from _slices(source, chunks, low - first, high - first)


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
    refused: Mapping[str, int] = field(default_factory=dict)
    """Why rows were dropped -> how many."""


class Tokenizing:
    """Builds units, several at once. A context manager.

    Args:
        identity: what of the tokenizer enters a unit's key.
        num_proc: 1 means this process; more are started when the first unit has to be built.
    """

    def __init__(self, units: UnitCache, sources: Sources, identity: Any, num_proc: int) -> None:
        self._units, self._sources, self._identity = units, sources, identity
        self._num_proc = num_proc
        self._stack = ExitStack()
        self._locks = Locks()

    def __enter__(self) -> Tokenizing:
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.close()

    def units(self, wanted: Sequence[tuple[Slice, RowEncoding]], told: Told) -> list[Unit]:
        """The units of slices, in this order; several are worked at, so that small ones do not
        leave processes idle.

        Args:
            told: called, by one thread at a time, with the rows and tokens that are done.
        """
        if self._num_proc == 1:
            return [self.unit(part, encoding, told) for part, encoding in wanted]
        one = threading.Lock()

        def tell(rows: int, tokens: int) -> None:
            with one:
                told(rows, tokens)

        def build(pair: tuple[Slice, RowEncoding]) -> Unit:
            return self.unit(*pair, tell)

        return all_of(build, wanted, min(self._num_proc + 1, _UNITS_AT_ONCE), self._chunks.stop)

    def unit(self, part: Slice, encoding: RowEncoding, told: Told) -> Unit:
        """The unit of a slice, built now if it is not there.

        Args:
            told: called with the rows and the tokens that have just been done.
        """
        spec = {
            "source": part.source,
            "rows": [part.low, part.high],
            "format": encoding.format,
            "options": encoding.options,
            "template": encoding.template,
            "tokenizer": self._identity,
            "on_bad_rows": encoding.on_bad_rows,
        }

        def build(out: Path) -> dict[str, Any]:
            file = self._sources.local(part.source)
            tasks = [ChunkTask(encoding, file, c, part.low, part.high) for c in part.chunks]
            try:
                return write_unit(self._encoded(tasks, told), out / UNIT_FILE)
            except BrokenProcessPool as error:
                raise StageError(
                    "a tokenizing process was killed, most likely for want of memory. Set "
                    f"`dataset_num_proc` lower than {self._num_proc}, or run again"
                ) from error

        with self._locks.of(fingerprint(spec)):  # two datasets may hold the same rows
            path, result, built = self._units.get_or_build("tokens", VERSION, spec, build)
        if not built:
            told(len(part), result["tokens"])
        counts = (result[name] for name in ("examples", "tokens", "unended", "refused"))
        return Unit(path / UNIT_FILE, *counts)

    def _encoded(self, tasks: list[ChunkTask], told: Told) -> Iterator[Block]:
        alone = self._num_proc == 1
        blocks = map(encode_chunk, tasks) if alone else self._chunks.encoded(tasks)
        for task, block in zip(tasks, blocks, strict=True):
            chunk = task.chunk
            end = min(task.high, chunk.first_row + chunk.rows)
            told(end - max(task.low, chunk.first_row), len(block.input_ids))
            yield block

    @cached_property
    def _chunks(self) -> ChunkPool:
        return self._stack.enter_context(ChunkPool(self._num_proc))
