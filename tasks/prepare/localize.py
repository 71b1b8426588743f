"""Source files brought to this machine in a form that can be read from the middle.

Plain JSON lines, text, Parquet and Arrow files are read where they lie. What is remote or
compressed is copied, and JSON documents and CSV, which cannot be cut at a byte, become JSON lines.
"""

from __future__ import annotations

import csv
import hashlib
import json
import lzma
import shutil
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from regrow.infra import store
from regrow.infra.digests import sha256_file
from regrow.tasks.prepare.folders import COMPRESSED
from regrow.tasks.stage import StageError

_BLOCK = 1 << 20


@dataclass(frozen=True)
class LocalFile:
    """A file on this machine that readers can open at a chunk."""

    path: str
    layout: str
    """lines (JSON objects), text, parquet or arrow."""
    place: str
    """Where it came from, for people."""
    by_line: bool
    """Whether rows are the lines of the original file."""

    def where(self, row: int) -> str:
        """Row `row` (from 0) as people find it."""
        return f"{self.place}:{row + 1}" if self.by_line else f"{self.place}, row {row + 1}"


def localize(place: str, sha256: str, kind: str, scratch: Path) -> LocalFile:
    """The file at `place`, ready to be read.

    Args:
        sha256: digest of the file's bytes as they lie there.
        kind: as `sources.file_kind` gives it.
        scratch: directory for copies.

    Raises:
        StageError: when the file is not there, is not what the digest says, or is malformed.
    """
    path = _fetched(place, sha256, scratch)
    if path.suffix.lower() in COMPRESSED:
        path = _unpacked(path, place, scratch / f"{sha256[:16]}{PurePosixPath(path.stem).suffix}")
    if kind == "json" and _is_json_document(path):
        lines = _as_lines(_json_rows(path, place), scratch / f"{sha256[:16]}.{kind}.jsonl")
        return LocalFile(str(lines), "lines", place, by_line=False)
    if kind in ("csv", "tsv"):
        rows = _csv_rows(path, place, "\t" if kind == "tsv" else ",")
        lines = _as_lines(rows, scratch / f"{sha256[:16]}.{kind}.jsonl")
        return LocalFile(str(lines), "lines", place, by_line=False)
    layout = "lines" if kind in ("json", "jsonl") else kind
    return LocalFile(str(path), layout, place, by_line=layout in ("lines", "text"))


def _fetched(place: str, sha256: str, scratch: Path) -> Path:
    try:
        if not store.is_url(place):
            path, found = Path(place), sha256_file(place)
        else:
            path = scratch / f"{sha256[:16]}-{PurePosixPath(place.split('?', 1)[0]).name}"
            found = _download(place, path)
    except FileNotFoundError as error:
        raise StageError(f"{place}: the file is gone. Put it back, or plan again") from error
    if found != sha256:
        raise StageError(
            f"{place}: the file has changed since the plan was made (its sha256 is now "
            f"{found[:12]}..., planned was {sha256[:12]}...). Run again to plan with what it is now"
        )
    return path


def _download(url: str, target: Path) -> str:
    digest = hashlib.sha256()
    with store.open_raw(url) as source, target.open("wb") as out:
        while block := source.read(_BLOCK):
            digest.update(block)
            out.write(block)
    return digest.hexdigest()


def _unpacked(path: Path, place: str, target: Path) -> Path:
    try:
        with _opened(path) as source, target.open("wb") as out:
            shutil.copyfileobj(source, out, _BLOCK)
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise StageError(
            f"{place}: cannot be decompressed ({error}); is the copy whole?"
        ) from error
    return target


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """The decompressed bytes of a file."""
    if path.suffix.lower() != ".zst":
        with store.open_url(str(path)) as source:
            yield source
        return
    import pyarrow as pa

    with pa.OSFile(str(path)) as raw, pa.CompressedInputStream(raw, "zstd") as source:
        yield cast(IO[bytes], source)


def _as_lines(rows: Iterable[Any], target: Path) -> Path:
    with target.open("w", encoding="utf-8") as out:
        for row in rows:
            # Surrogates that JSON can hold and UTF-8 cannot stay escaped.
            out.write(json.dumps(row) + "\n")
    return target


def _csv_rows(path: Path, place: str, delimiter: str) -> Iterator[dict[str, str]]:
    csv.field_size_limit(1 << 30)  # a document may stand in one cell; Python's limit is 128 KiB
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter=delimiter, strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise StageError(
                        f"{place}:{reader.line_num}: the row has another number of cells than the "
                        f"header ({', '.join(reader.fieldnames or ())})"
                    )
                yield row
        except (csv.Error, UnicodeDecodeError) as error:
            raise StageError(f"{place}:{reader.line_num}: not valid CSV ({error})") from error


def _is_json_document(path: Path) -> bool:
    """Whether the file is one JSON value, rather than one value a line."""
    with path.open("rb") as file:
        first = file.readline().removeprefix(b"\xef\xbb\xbf").strip()
        while not first and (line := file.readline()):
            first = line.strip()
        rest = file.readline().strip()
    if first.startswith(b"["):
        return True
    try:
        value = json.loads(first)
    except ValueError:
        return True
    return not rest and isinstance(value, dict) and len(_lists_of_objects(value)) == 1


def _lists_of_objects(value: dict[str, Any]) -> list[str]:
    return [k for k, v in value.items() if isinstance(v, list) and v and isinstance(v[0], dict)]


def _json_rows(path: Path, place: str) -> Iterator[Any]:
    with path.open(encoding="utf-8-sig") as file:
        document = _JsonReader(file, place)
        try:
            within = document.peek() == "{"
            if within:
                document.enter_only_list()
            yield from document.elements()
            if not within:
                document.expect_end()
        except UnicodeDecodeError as error:
            raise StageError(
                f"{place}: it is not text in UTF-8 ({error}); convert the file"
            ) from error


class _JsonReader:
    """Reads a JSON list element by element, so that its length does not matter."""

    def __init__(self, file: IO[str], place: str) -> None:
        self._file, self._place = file, place
        self._text, self._at, self._read = "", 0, 0

    def elements(self) -> Iterator[Any]:
        """The objects of the list that begins here."""
        self._expect("[")
        if self.peek() == "]":
            self._expect("]")
            return
        while True:
            if self.peek() != "{":
                self._fail("a list of objects is needed")
            yield self._value()
            if self.peek() != ",":
                break
            self._expect(",")
        self._expect("]")

    def expect_end(self) -> None:
        """Nothing may follow: it would be rows that nobody reads."""
        if self.peek():
            self._fail("text follows the list")

    def enter_only_list(self) -> None:
        """Go into an object, up to the list that it holds."""
        self._expect("{")
        while True:
            if self.peek() != '"':
                self._fail("it is an object that holds no list of rows")
            self._value()
            self._expect(":")
            if self.peek() == "[":
                return
            self._value()
            self._expect(",")

    def peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            while self._at < len(self._text):
                if not self._text[self._at].isspace():
                    return self._text[self._at]
                self._at += 1
            if not self._more():
                return ""

    def _value(self) -> Any:
        decoder = json.JSONDecoder()
        while True:
            try:
                value, end = decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                position = self._read + error.pos
                if not self._more():
                    self._fail(error.msg, position)
                continue
            # A number at the end of what was read may go on in what was not.
            if end < len(self._text) or not self._more():
                self._at = end
                return value

    def _expect(self, mark: str) -> None:
        if self.peek() != mark:
            self._fail(f"{mark!r} is expected")
        self._at += 1

    def _more(self) -> bool:
        # As much again as is pending: an element of n characters is tried about log n times.
        pending = self._text[self._at :]
        block = self._file.read(max(_BLOCK, len(pending)))
        self._read += self._at
        self._text, self._at = pending + block, 0
        return bool(block)

    def _fail(self, why: str, position: int | None = None) -> None:
        at = self._read + self._at if position is None else position
        raise StageError(
            f"{self._place}: not a JSON list of rows: {why}, at character {at + 1}. One object a "
            "line (.jsonl) is read as well"
        )
