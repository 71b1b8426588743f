"""What lies on a file system with folders, and how a listing shows a file, on any file system.

fsspec's own `find`, `glob`, `exists` and `isfile` take a folder that cannot be listed for an empty
one, and a file that cannot be looked at for none. Here only what is not there counts as not there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

# How file systems call the time of a file's last change.
_CHANGED = ("LastModified", "last_modified", "mtime", "updated", "created")


@dataclass(frozen=True)
class Entry:
    """A file as a listing shows it."""

    size: int
    """Bytes."""
    changed: datetime
    """When it was last written, by the store's clock, in UTC."""


def entry_of(info: Mapping[str, Any]) -> Entry:
    """What fsspec tells of a file, in one form."""
    at = next((info[name] for name in _CHANGED if info.get(name)), None)
    if isinstance(at, (int, float)):
        at = datetime.fromtimestamp(at, UTC)
    elif isinstance(at, str):
        at = datetime.fromisoformat(at)
    # What has no time counts as new: it is for deciding what is old enough to go.
    at = at or datetime.now(UTC)
    return Entry(int(info["size"] or 0), at if at.tzinfo else at.replace(tzinfo=UTC))


def files_below(fs: Any, path: str, depth: int | None = None) -> dict[str, Mapping[str, Any]]:
    """{name: what `fs` tells of it} of the files below a folder, sorted, or of the file itself.

    Links to folders are not followed, and count as files.

    Args:
        depth: levels of folders to look at; None: all.

    Raises:
        OSError: when a folder cannot be listed; one that is gone holds nothing.
    """
    found: dict[str, Mapping[str, Any]] = {}
    folders = [(path, 1)]
    while folders:
        folder, level = folders.pop()
        for info in _listed(fs, folder):
            name = info["name"].rstrip("/")
            if info["type"] != "directory":
                found[info["name"]] = info
            elif name != folder and level != depth:
                folders.append((name, level + 1))
    if not found:  # it may be a file, of which some file systems give no listing
        info = info_of(fs, path)
        found = {path: info} if info is not None and info["type"] != "directory" else {}
    return dict(sorted(found.items()))


def info_of(fs: Any, path: str) -> Mapping[str, Any] | None:
    """What `fs` tells of a file or folder; None when nothing is there. Raises OSError."""
    try:
        return fs.info(path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _listed(fs: Any, folder: str) -> Iterable[Mapping[str, Any]]:
    try:
        return fs.ls(folder, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        return []
