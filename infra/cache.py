"""Local copies of artifacts from a remote store: bounded, and never removed under a reader.

Layout below the cache's root:

    <key>/<attempt>/       one downloaded artifact; its folder's time says when it was last used
    in-use/<id>.txt        what one process uses, one name a line; locked while the process lives
    lock                   taken by who removes, and by who announces what it uses

Locks are `flock`s: the system drops them with their process, so a killed one blocks nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

_IN_USE = "in-use"
# A download that has not been touched for a day was left by a killed process.
_ABANDONED_SECONDS = 24 * 3600
# Of the free disk space a download may take nine tenths: the rest is for the run's own files.
_SHARE_OF_FREE = 0.9
# {root: this process's list}. Open for as long as the process lives: who was given a path may read
# it long after the object that gave it is gone.
_LISTS: dict[Path, IO[str]] = {}


@dataclass(frozen=True)
class _Entry:
    path: Path
    name: str
    """`<key>/<attempt>`."""
    size: int
    used: float


class LocalCache:
    """Directories by name below one root, the least recently used removed when space is short.

    Args:
        root: local directory, shared by all processes of this machine.
        limit: bytes that all entries together may take; an entry larger than that is kept while
            it is used. None: as much as the disk has.
    """

    def __init__(self, root: Path, limit: int | None) -> None:
        self._root, self._limit = root, limit
        self._about: int | None = None  # bytes in the cache, so that not every download counts all

    def use(self, name: str) -> Path:
        """Where the entry `name` is or shall be; nobody removes it while this process lives."""
        path = self._root / name
        with self._lock():
            mine = self._my_list()
            mine.write(f"{name}\n")
            mine.flush()
            if path.is_dir():
                os.utime(path)
        return path

    def new_partial(self, name: str) -> Path:
        """A new directory to fill and to rename to what `use` gave."""
        path = self._root / f"{name}.{uuid.uuid4().hex}.partial"
        path.mkdir(parents=True)
        return path

    def make_room(self, size: int, last: Callable[[], Collection[str]]) -> None:
        """Remove what was used longest ago until `size` more bytes fit, as far as nobody uses it.

        Args:
            last: asked only when something must go: keys that go after all others.
        """
        if self._about is None:
            self._about = sum(entry.size for entry in self._entries())
        if self._fits(self._about, size):
            self._about += size
            return
        with self._lock():
            used = self._in_use()
            entries = [entry for entry in self._entries() if entry.name not in used]
            total = sum(entry.size for entry in self._entries())
            late = set(last())
            entries.sort(key=lambda entry: (entry.name.rpartition("/")[0] in late, entry.used))
            for entry in entries:
                if self._fits(total, size):
                    break
                shutil.rmtree(entry.path, ignore_errors=True)
                total -= entry.size
        self._about = total + size

    def _fits(self, total: int, size: int) -> bool:
        within = self._limit is None or total + size <= self._limit
        return within and size <= shutil.disk_usage(self._root).free * _SHARE_OF_FREE

    def _entries(self) -> list[_Entry]:
        """All complete entries; what killed downloads left is removed on the way."""
        self._root.mkdir(parents=True, exist_ok=True)
        found = []
        for folder, inner, _ in os.walk(self._root):  # passes over what others remove meanwhile
            for name in sorted(name for name in inner if name.startswith("attempt-")):
                with contextlib.suppress(FileNotFoundError):
                    found += self._entry(Path(folder) / name)
            inner[:] = [name for name in inner if not name.startswith("attempt-")]
        return found

    def _entry(self, path: Path) -> list[_Entry]:
        """The complete entry there, if it is one. Raises FileNotFoundError when it goes."""
        used = path.stat().st_mtime
        if path.suffix == ".partial":
            if time.time() - used > _ABANDONED_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
            return []
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        return [_Entry(path, path.relative_to(self._root).as_posix(), size, used)]

    def _my_list(self) -> IO[str]:
        root = self._root.resolve()
        if root not in _LISTS:
            folder = root / _IN_USE
            folder.mkdir(parents=True, exist_ok=True)
            _LISTS[root] = (folder / f"{uuid.uuid4().hex}.txt").open("w")
            fcntl.flock(_LISTS[root], fcntl.LOCK_EX)
        return _LISTS[root]

    def _in_use(self) -> set[str]:
        """Names that living processes announced; the lists of dead ones are removed."""
        names: set[str] = set()
        for path in (self._root / _IN_USE).glob("*.txt"):
            with path.open() as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    names.update(file.read().split("\n"))
                else:
                    path.unlink(missing_ok=True)
        return names

    @contextmanager
    def _lock(self) -> Iterator[None]:
        self._root.mkdir(parents=True, exist_ok=True)
        with (self._root / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
