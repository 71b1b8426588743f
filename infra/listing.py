"""A file as a listing shows it: its size and the time of its last change, on any file system."""

from __future__ import annotations

from collections.abc import Mapping
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
