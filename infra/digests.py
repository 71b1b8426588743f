"""sha256 of files and URLs, remembered by (place, size, mtime or etag) so that a plan is quick.

The memory is a small SQLite file. It is only a shortcut: losing it costs time, never correctness.
"""

from __future__ import annotations

import hashlib
import sqlite3
import time
from contextlib import closing
from pathlib import Path

from regrow.infra.store import StoreError, identity, open_raw

_BLOCK = 1 << 22  # 4 MiB: large enough that reading, not Python, is the cost
# A file changed within the same clock tick as its hashing could keep size and mtime; such young
# files are hashed again next time (git calls this the "racily clean" problem).
_SETTLED_NS = 2_000_000_000


def sha256_file(path: str | Path) -> str:
    """sha256 (64 hex digits) of a local file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


class DigestMemo:
    """Digests by content, computed once per version of a file.

    Args:
        path: the SQLite file, made when absent; None remembers nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._create()
            except sqlite3.DatabaseError:
                path.unlink()  # not a database, or a damaged one: nothing that matters is lost
                self._create()
        except (OSError, sqlite3.Error) as error:
            raise StoreError(
                f"cannot write to {path.parent}: {error}. Check the path, the permissions and the "
                "free space, or set REGROW_HOME to another place"
            ) from error

    def _create(self) -> None:
        with closing(self._connect()) as db, db:
            db.execute(
                "CREATE TABLE IF NOT EXISTS digests"
                " (place TEXT PRIMARY KEY, size INTEGER, mark TEXT, sha256 TEXT)"
            )

    def _connect(self) -> sqlite3.Connection:
        assert self._path is not None
        # Half a minute of waiting for another process's write, then a plain error.
        return sqlite3.connect(self._path, timeout=30)

    def sha256(self, place: str | Path) -> str:
        """sha256 of a local file or a URL. Raises FileNotFoundError."""
        place = str(place)
        size, mark = identity(place)
        known = self._recall(place, size, mark)
        if known is not None:
            return known
        digest = _hash(place)
        if mark:
            self._remember(place, size, mark, digest)
        return digest

    def _recall(self, place: str, size: int, mark: str) -> str | None:
        if self._path is None:
            return None
        with closing(self._connect()) as db:
            row = db.execute(
                "SELECT sha256 FROM digests WHERE place=? AND size=? AND mark=?",
                (place, size, mark),
            ).fetchone()
        return row[0] if row else None

    def _remember(self, place: str, size: int, mark: str, digest: str) -> None:
        if self._path is None or _is_young(place):
            return
        with closing(self._connect()) as db, db:
            db.execute(
                "INSERT OR REPLACE INTO digests VALUES (?, ?, ?, ?)", (place, size, mark, digest)
            )


def _is_young(place: str) -> bool:
    path = Path(place)
    return path.exists() and time.time_ns() - path.stat().st_mtime_ns < _SETTLED_NS


def _hash(place: str) -> str:
    if Path(place).exists():
        return sha256_file(place)
    digest = hashlib.sha256()
    with open_raw(place) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
