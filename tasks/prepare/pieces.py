"""One piece of a file that is read as a stream: some megabytes of lines, row groups or batches."""

from __future__ import annotations

import io
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

import pyarrow as pa

from regrow.infra import store
from regrow.infra.digests import sha256_file
from regrow.tasks.stage import StageError

PIECE_BYTES = 16 << 20
"""About 4 M tokens (4 bytes each): enough for 16 processes with a chunk of 1 MiB for each, little
to read in vain at the end, and a second's download."""

_BATCH_BYTES = 1 << 20
"""Of a record batch in a piece of a table: what one process tokenizes at a time."""

_LINES = {"jsonl": "jsonl", "json": "jsonl", "text": "text"}
_TABLES = ("parquet", "arrow")


class PieceReader:
    """Reads pieces of files. The next piece of a file is read without opening it anew: a packed
    file can only be read from its beginning."""

    def __init__(self) -> None:
        self._at: tuple[str, int] | None = None
        self._contents: Generator[tuple[Any, bool]] | None = None

    def read(self, place: str, kind: str, start: int, out: Path) -> dict[str, Any]:
        """Write the piece of a file that begins at `start` to `out`, as lines or an Arrow file.

        Args:
            kind: of the file, as `folders.file_kind` gives it.
            start: byte after decompression, or row group or record batch.

        Returns:
            {"stop": one past the last, "rows": number, "last": whether the file ends there,
            "sha256": of `out`, "kind": of `out`}

        Raises:
            StageError: for a kind that cannot be read from the middle, or an unreadable file.
        """
        if kind not in _LINES and kind not in _TABLES:
            raise StageError(
                f"{place}: {kind} files cannot be read as a stream. Use JSON lines, text, Parquet "
                "or Arrow, or `streaming: false`"
            )
        if self._contents is None or self._at != (place, start):
            self.close()
            contents = _lines if kind in _LINES else _parquet if kind == "parquet" else _arrow
            self._contents = contents(place, start)
        self._at = None
        with _readable(place):
            write = _write_lines if kind in _LINES else _write_tables
            size, rows, last = write(self._contents, out)
        self._at = (place, start + size)
        told = {"stop": start + size, "rows": rows, "last": last, "sha256": sha256_file(out)}
        return told | {"kind": _LINES.get(kind, "arrow")}

    def close(self) -> None:
        """Close the file that is open, if any."""
        if self._contents is not None:
            self._contents.close()
        self._contents = None


@contextmanager
def _readable(place: str) -> Iterator[None]:
    try:
        yield
    except StageError:
        raise
    # ValueError: what Arrow and fsspec raise for malformed files and servers that know no ranges.
    except (OSError, EOFError, ValueError, pa.ArrowNotImplementedError) as error:
        raise StageError(f"{place}: cannot be read ({error}). Is it there, and whole?") from error


def _lines(place: str, start: int) -> Generator[tuple[bytes, bool]]:
    """(whole lines, whether they are the last) for each piece of a file from byte `start` on."""
    with _opened(place, start) as source:
        last = False
        while not last:
            block = source.read(PIECE_BYTES)
            last = len(block) < PIECE_BYTES
            block += source.readline()
            if start == 0 and block.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
                raise StageError(
                    f"{place}: it is one JSON list, which cannot be read as a stream. Convert it "
                    "to JSON lines, or use `streaming: false`"
                )
            start += len(block)
            yield block, last


def _write_lines(contents: Iterator[tuple[bytes, bool]], out: Path) -> tuple[int, int, bool]:
    """(bytes, rows, whether they are the last)."""
    block, last = next(contents)
    out.write_bytes(block)
    return len(block), block.count(b"\n") + (bool(block) and not block.endswith(b"\n")), last


@contextmanager
def _opened(place: str, start: int) -> Iterator[IO[bytes]]:
    """A file's bytes, decompressed, from `start` on. What is plain is read from there only."""
    if PurePosixPath(place.split("?", 1)[0]).suffix.lower() != ".zst":
        with store.open_url(place) as opened:
            # By itself it may give less than it is asked for, though it does not end there: what
            # has come so far from a server that tells no length.
            source = io.BufferedReader(cast(io.RawIOBase, opened))
            if start:
                source.seek(start)
            yield source
        return
    with store.open_raw(place) as raw:
        source = io.BufferedReader(pa.CompressedInputStream(raw, "zstd"), _BATCH_BYTES)
        while start:
            start -= len(source.read(min(start, _BATCH_BYTES)))
        yield source


def _parquet(place: str, start: int) -> Generator[tuple[pa.Table, bool]]:
    """(row group, whether it is the last) from group `start` on; at least an empty one."""
    import pyarrow.parquet as pq

    with store.open_raw(place) as raw, pq.ParquetFile(raw) as source:
        groups = source.num_row_groups
        for number in range(start, groups):
            yield source.read_row_group(number), number + 1 == groups
        if not groups:
            yield source.schema_arrow.empty_table(), True


def _arrow(place: str, start: int) -> Generator[tuple[pa.Table, bool]]:
    """The same for record batches of an IPC file, which can be opened anywhere, or of a stream,
    which cannot."""
    with store.open_raw(place) as raw:
        try:
            reader = pa.ipc.open_file(raw)
            batches = (reader.get_batch(i) for i in range(start, reader.num_record_batches))
        except pa.ArrowInvalid:
            raw.seek(0)
            reader = pa.ipc.open_stream(raw)
            batches = islice(reader, start, None)
        batch = next(batches, None)
        if batch is None:
            yield reader.schema.empty_table(), True
        while batch is not None:
            following = next(batches, None)
            yield pa.Table.from_batches([batch]), following is None
            batch = following


def _write_tables(contents: Iterator[tuple[pa.Table, bool]], out: Path) -> tuple[int, int, bool]:
    """As many tables as make a piece: (tables, rows, whether they are the last)."""
    count = rows = size = 0
    table, last = next(contents)
    with pa.ipc.new_file(out, table.schema) as writer:
        while True:
            batch_rows = max(1, table.num_rows * _BATCH_BYTES // max(table.nbytes, 1))
            writer.write_table(table, max_chunksize=batch_rows)
            count, rows, size = count + 1, rows + table.num_rows, size + table.nbytes
            if last or size >= PIECE_BYTES:
                return count, rows, last
            table, last = next(contents)
