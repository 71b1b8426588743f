"""Rows out of local files, chunk by chunk, in bounded memory.

A chunk is about a megabyte of a file: bytes of a line file, row groups of a Parquet file, record
batches of an Arrow file, or some rows of a large one of these. Where the chunks lie depends on the
file alone, never on who reads it.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

from regrow.tasks.prepare.localize import LocalFile
from regrow.tasks.stage import StageError

CHUNK_BYTES = 1 << 20
"""About half a second of tokenizing (0.6 M tokens/s, measured): small enough to keep many
processes busy on one file, large enough that handing it over costs nothing."""

_LARGEST = 16
"""Times `CHUNK_BYTES`: a row group or record batch beyond that is several chunks. Each of them has
to decompress what stands before its rows, some tenths of a second for 100 MB, where 16 MiB are four
seconds of tokenizing and more."""

_BATCH_ROWS = 256
"""Rows of a table in memory as Python objects at a time."""


@dataclass(frozen=True)
class Chunk:
    """A part of a file that is read at once."""

    start: int
    """First byte, row group or record batch."""
    stop: int
    """One past the last."""
    first_row: int
    """Row number of the first row, from 0."""
    rows: int
    size: int
    """Bytes, about."""
    skip: int = 0
    """Rows from `start` on that belong to the chunk before."""


def find_chunks(file: LocalFile) -> list[Chunk]:
    """The chunks of a file, in order. Raises StageError when it is not what its ending says."""
    if file.layout in ("lines", "text"):
        return list(_line_chunks(file))
    sizes = _row_groups(file) if file.layout == "parquet" else _batches(file)
    return list(_grouped(sizes))


def read_rows(file: LocalFile, chunk: Chunk, low: int, high: int) -> Iterator[tuple[int, dict]]:
    """(row number, row) of those rows of a chunk whose number is in [low, high).

    Raises:
        StageError: for a row that cannot be read, naming the file and the row.
    """
    rows = {"lines": _json_lines, "text": _text_lines, "parquet": _parquet, "arrow": _arrow}
    numbered = enumerate(rows[file.layout](file, chunk), chunk.first_row)
    within = islice(numbered, max(low - chunk.first_row, 0), max(high - chunk.first_row, 0))
    return ((number, row) for number, row in within if row is not None)


def _line_chunks(file: LocalFile) -> Iterator[Chunk]:
    start = row = 0
    with open(file.path, "rb") as source:
        while block := source.read(CHUNK_BYTES):
            block += source.readline()
            rows = block.count(b"\n") + (not block.endswith(b"\n"))
            yield Chunk(start, start + len(block), row, rows, len(block))
            start, row = start + len(block), row + rows


def _lines(file: LocalFile, chunk: Chunk) -> Iterator[str]:
    with open(file.path, "rb") as source:
        source.seek(chunk.start)
        block = source.read(chunk.stop - chunk.start)
    if chunk.start == 0:
        block = block.removeprefix(b"\xef\xbb\xbf")
    # Not splitlines(): JSON and text may hold other characters that Unicode calls line ends.
    for number, line in enumerate(block.removesuffix(b"\n").split(b"\n")):
        try:
            yield line.removesuffix(b"\r").decode("utf-8")
        except UnicodeDecodeError as error:
            where = file.where(chunk.first_row + number)
            raise StageError(f"{where}: not UTF-8 text ({error}); convert the file") from error


def _text_lines(file: LocalFile, chunk: Chunk) -> Iterator[dict | None]:
    return ({"text": line} if line.strip() else None for line in _lines(file, chunk))


def _json_lines(file: LocalFile, chunk: Chunk) -> Iterator[dict | None]:
    for number, line in enumerate(_lines(file, chunk)):
        if not line.strip():
            yield None
            continue
        where = file.where(chunk.first_row + number)
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise StageError(
                f"{where}: not valid JSON ({error}). Mend or remove the row"
            ) from error
        if not isinstance(row, dict):
            raise StageError(f"{where}: a row must be a JSON object, not {line[:40]!r}")
        yield row


def _grouped(sizes: Iterator[tuple[int, int]]) -> Iterator[Chunk]:
    """Neighbouring (rows, bytes) parts as chunks of at least `CHUNK_BYTES`; one that is much larger
    as several."""
    start = row = rows = size = 0
    index = -1
    for index, (more_rows, more_bytes) in enumerate(sizes):
        if more_bytes > _LARGEST * CHUNK_BYTES:
            if rows:
                yield Chunk(start, index, row, rows, size)
            yield from _cut(index, row + rows, more_rows, more_bytes)
            start, row, rows, size = index + 1, row + rows + more_rows, 0, 0
            continue
        rows, size = rows + more_rows, size + more_bytes
        if size >= CHUNK_BYTES:
            yield Chunk(start, index + 1, row, rows, size)
            start, row, rows, size = index + 1, row + rows, 0, 0
    if rows:
        yield Chunk(start, index + 1, row, rows, size)


def _cut(index: int, first_row: int, rows: int, size: int) -> Iterator[Chunk]:
    count = min(-(-size // (_LARGEST * CHUNK_BYTES)), max(rows, 1))
    edges = [rows * part // count for part in range(count + 1)]
    for skip, stop in itertools.pairwise(edges):
        yield Chunk(index, index + 1, first_row + skip, stop - skip, size // count, skip)


def _row_groups(file: LocalFile) -> Iterator[tuple[int, int]]:
    import pyarrow.parquet as pq

    with _readable(file):
        metadata = pq.read_metadata(file.path)
        for index in range(metadata.num_row_groups):
            group = metadata.row_group(index)
            yield group.num_rows, group.total_byte_size


def _parquet(file: LocalFile, chunk: Chunk) -> Iterator[dict]:
    import pyarrow.parquet as pq

    # pre_buffer=False: pages are read as they are needed, not whole columns of a row group.
    with _readable(file), pq.ParquetFile(file.path, pre_buffer=False) as source:
        groups = list(range(chunk.start, chunk.stop))
        yield from _rows_of(source.iter_batches(_BATCH_ROWS, row_groups=groups), chunk)


def _batches(file: LocalFile) -> Iterator[tuple[int, int]]:
    with _readable(file):
        for batch in _record_batches(file, 0, None):
            yield batch.num_rows, batch.nbytes


def _arrow(file: LocalFile, chunk: Chunk) -> Iterator[dict]:
    with _readable(file):
        yield from _rows_of(_record_batches(file, chunk.start, chunk.stop), chunk)


def _rows_of(batches: Iterable[Any], chunk: Chunk) -> Iterator[dict]:
    """The chunk's rows of the batches that begin with `chunk.start`."""
    begin, stop, at = chunk.skip, chunk.skip + chunk.rows, 0
    for batch in batches:
        for first in range(max(begin - at, 0), min(stop - at, batch.num_rows), _BATCH_ROWS):
            last = min(first + _BATCH_ROWS, stop - at)
            yield from batch.slice(first, last - first).to_pylist()
        at += batch.num_rows
        if at >= stop:
            return


def _record_batches(file: LocalFile, start: int, stop: int | None) -> Iterator[Any]:
    """Batches of an IPC file, which can be opened anywhere, or of a stream, which cannot."""
    import pyarrow as pa

    with pa.memory_map(file.path) as source:
        try:
            reader = pa.ipc.open_file(source)
        except pa.ArrowInvalid:
            source.seek(0)
            yield from islice(pa.ipc.open_stream(source), start, stop)
            return
        for index in range(start, reader.num_record_batches if stop is None else stop):
            yield reader.get_batch(index)


@contextmanager
def _readable(file: LocalFile) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise StageError(f"{file.place}: cannot be read as {file.layout} ({error})") from error
