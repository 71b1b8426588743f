"""A remote file to read from, whose every request is made again after a fault that passes."""

from __future__ import annotations

import io
from typing import Any

from regrow.infra.remote import IncompleteTransfer, patiently


class PatientFile(io.RawIOBase):
    """A file of known size on an fsspec file system, read in ranges: just those, nothing ahead.

    Args:
        fs: the file system.
        path: the file, as `fs` names it.
        url: the file, as people name it.
        size: bytes.
    """

    def __init__(self, fs: Any, path: str, url: str, size: int) -> None:
        self._fs, self._path, self._url, self._size = fs, path, url, size
        self._at = 0

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def tell(self) -> int:
        """Where the next byte comes from."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a byte; beyond the end nothing is read."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        if start + offset < 0:
            raise ValueError(f"{self._url}: there is no byte {start + offset}")
        self._at = start + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` as far as the file goes.

        Raises:
            StoreError: when the store refuses or still fails after several tries.
        """
        end = min(self._at + len(buffer), self._size)
        if end <= self._at:
            return 0
        data = patiently(self._url, lambda: read_range(self._fs, self._path, self._at, end))
        buffer[: len(data)] = data
        self._at = end
        return len(data)


def read_range(fs: Any, path: str, start: int, end: int) -> bytes:
    """Bytes `start` to `end` of a file. Raises IncompleteTransfer when other than those came."""
    data = fs.cat_file(path, start=start, end=end)
    if len(data) != end - start:
        raise IncompleteTransfer(f"{path}: {len(data)} of {end - start} bytes came")
    return data
