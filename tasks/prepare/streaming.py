"""A file read from its beginning, piece by piece, where it lies: plain, packed or remote.

A piece is some megabytes of a file. Once it is known (a small unit: digest, rows, where it ends) it
is a source file like any other, and its text is fetched only when its tokens are not there yet. So
a stream that was interrupted goes on at the first piece that is missing.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from regrow.infra import store
from regrow.infra.digests import DigestMemo
from regrow.tasks.prepare.pieces import PIECE_BYTES, PieceReader
from regrow.tasks.prepare.slices import Rows
from regrow.tasks.prepare.sources import stream_identity
from regrow.tasks.prepare.spec import VERSION, DatasetSpec, Part, SourceFile
from regrow.tasks.stage import StageError, UnitCache


@dataclass(frozen=True)
class Piece:
    """A part of a file."""

    file: SourceFile
    start: int
    """Byte after decompression, or row group or record batch."""
    stop: int
    """One past the last."""
    first_row: int
    rows: int
    sha256: str
    """Of the piece as it is written for readers."""
    kind: str
    last: bool
    """Whether the file ends here."""


class Streams(Mapping[str, str]):
    """The pieces of files, and {digest of a piece: path}, written here when it is asked for.

    Args:
        locations: digest -> place of the whole files.
        scratch: directory for the piece in work; only one is kept.
    """

    def __init__(self, locations: Mapping[str, str], scratch: Path, units: UnitCache) -> None:
        self._locations, self._units = locations, units
        self._folder = scratch / "pieces"
        self._memo = DigestMemo(scratch / "digests.sqlite")
        self._known: dict[str, Piece] = {}
        self._reader = PieceReader()

    def close(self) -> None:
        """Close what is open."""
        self._reader.close()

    def parts(self, dataset: DatasetSpec) -> Iterator[DatasetSpec]:
        """The dataset piece by piece, without the rows that it does not want."""
        for part in dataset.parts:
            low, high = part.rows.limits()
            first = 0
            for piece in itertools.chain.from_iterable(map(self._pieces, part.files)):
                begin = max(low - first, 0)
                end = piece.rows if high is None else min(high - first, piece.rows)
                if begin < end:
                    source = SourceFile(piece.sha256, piece.kind)
                    yield _only(dataset, source, begin, end)
                first += piece.rows
                if high is not None and first >= high:
                    break

    def _pieces(self, file: SourceFile) -> Iterator[Piece]:
        start = first_row = 0
        while True:
            piece = self._piece(file, start, first_row)
            if piece.rows:
                yield piece
            if piece.last:
                return
            start, first_row = piece.stop, first_row + piece.rows

    def _piece(self, file: SourceFile, start: int, first_row: int) -> Piece:
        """The piece that begins at `start`; read now if nothing is known of it."""

        def build(_out: Path) -> dict[str, Any]:
            out = self._fresh(file, first_row)
            return self._reader.read(self._place(file), file.kind, start, out)

        spec = {"file": file, "start": start, "bytes": PIECE_BYTES}
        _, found, _ = self._units.get_or_build("piece", VERSION, spec, build)
        piece = Piece(file, start, first_row=first_row, **found)
        self._known[piece.sha256] = piece
        return piece

    def _place(self, file: SourceFile) -> str:
        """Where the file is. Raises StageError when it has changed since the plan was made."""
        place = self._locations[file.sha256]
        try:
            remote = store.is_url(place)
            found = stream_identity(place) if remote else self._memo.sha256(place)
        except OSError as error:
            raise StageError(f"{place}: cannot be read ({error}). Is it there still?") from error
        if found not in (None, file.sha256):
            raise StageError(
                f"{place}: the file has changed since the plan was made (its "
                f"{'size or etag' if remote else 'sha256'} is another). Run again to plan with "
                "what it is now"
            )
        return place

    def _fresh(self, file: SourceFile, first_row: int) -> Path:
        """A place for the next piece; the one before is not needed any more."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for old in self._folder.iterdir():
            old.unlink()
        return self._folder / f"{file.sha256[:16]}-{first_row}"

    def __getitem__(self, sha256: str) -> str:
        """The path of a piece, read again if it is not here. Other digests are whole files."""
        piece = self._known.get(sha256)
        if piece is None:
            return self._locations[sha256]
        path = self._folder / f"{piece.file.sha256[:16]}-{piece.first_row}"
        if not path.is_file():
            path = self._fresh(piece.file, piece.first_row)
            found = self._reader.read(self._place(piece.file), piece.file.kind, piece.start, path)
            if found["sha256"] != sha256:
                raise StageError(
                    f"{self._locations[piece.file.sha256]}: rows from {piece.first_row + 1} are "
                    "not what they were when they were first read. Has the file changed?"
                )
        return str(path)

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)

    def named(self, message: str) -> str:
        """An error's message with the file in place of its piece."""
        for piece in self._known.values():
            path = str(self._folder / f"{piece.file.sha256[:16]}-{piece.first_row}")
            if path in message:
                place = self._locations[piece.file.sha256]
                return message.replace(path, f"{place} (after {piece.first_row} rows)")
        return message


def _only(dataset: DatasetSpec, source: SourceFile, begin: int, end: int) -> DatasetSpec:
    return replace(dataset, parts=(Part((source,), Rows(str(begin), str(end))),))
