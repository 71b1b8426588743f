"""Bytes under a root URL, on any fsspec file system. The only importer of fsspec.

Object stores have no rename and no directories, so nothing here relies on either: a name is
written whole, created exclusively, listed by prefix or removed. Listings are never cached (a cached
listing hides what another writer has made since: measured, shared reference platform.md part D).
"""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, cast

import fsspec
from fsspec.utils import infer_compression

# Transfers of one artifact at a time; object stores answer in tens of milliseconds and are
# latency-bound, so a handful of streams fills a link without exhausting file descriptors.
_TRANSFERS = 8

_EXTRA_OF_PROTOCOL = {
    "s3": "s3",
    "s3a": "s3",
    "gs": "gs",
    "gcs": "gs",
    "az": "az",
    "abfs": "az",
    "sftp": "sftp",
}


class StoreError(ValueError):
    """The store cannot be used as asked; the message names the URL and the remedy."""


def is_url(path: str) -> bool:
    """Whether `path` names a file system by protocol ("s3://..."), rather than a local path."""
    return "://" in path


def _file_system(url: str) -> tuple[Any, str]:
    protocol = url.split("://", 1)[0] if is_url(url) else "file"
    options = {} if protocol in {"file", "local", "memory"} else {"use_listings_cache": False}
    try:
        fs, path = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        extra = _EXTRA_OF_PROTOCOL.get(protocol)
        remedy = f"pip install 'regrow[{extra}]'" if extra else str(error)
        raise StoreError(f"{url}: no driver for {protocol}:// is installed; {remedy}") from error
    except ValueError as error:
        raise StoreError(f"{url}: {error}") from error
    return fs, path


def _is_local(fs: Any) -> bool:
    protocols = fs.protocol if isinstance(fs.protocol, (tuple, list)) else (fs.protocol,)
    return bool({"file", "local"} & set(protocols))


def expand(pattern: str) -> list[str]:
    """The files that a path, directory, glob or URL names, sorted; empty when there are none."""
    fs, path = _file_system(pattern)
    if any(mark in path for mark in "*?["):
        found = [name for name in fs.glob(path) if fs.isfile(name)]
    elif fs.isdir(path):
        found = fs.find(path)
    else:
        found = [path] if fs.exists(path) else []
    if _is_local(fs):
        return sorted(found)
    return sorted(fs.unstrip_protocol(name) for name in found)


def open_url(url: str, mode: str = "rb") -> IO[Any]:
    """Open a file on any file system; a `.gz`, `.bz2` or `.xz` ending is decompressed."""
    path = url.split("?", 1)[0] if is_url(url) else url
    opened = fsspec.open(url, mode, compression=infer_compression(path))
    return cast(IO[Any], cast(fsspec.core.OpenFile, opened).open())


def open_raw(url: str) -> IO[bytes]:
    """Open a file on any file system for reading its bytes as they are."""
    fs, path = _file_system(url)
    return fs.open(path, "rb")


def open_ranges(url: str) -> IO[bytes]:
    """Open a file on any file system for reading ranges of it: just those, nothing ahead."""
    fs, path = _file_system(url)
    # Readers that know what they want ask for all of it; by default fsspec fetches 5 MB each time.
    return fs.open(path, "rb", cache_type="none")


def identity(url: str) -> tuple[int, str]:
    """(size in bytes, a mark that changes when the content does: mtime and inode, or etag)."""
    fs, path = _file_system(url)
    if _is_local(fs):
        stat = os.stat(path)
        return stat.st_size, f"{stat.st_mtime_ns}-{stat.st_ino}"
    info = fs.info(path)
    names = ("ETag", "etag", "md5Hash", "LastModified", "Last-Modified", "mtime")
    mark = next((info[name] for name in names if info.get(name)), "")
    return int(info.get("size") or -1), str(mark)


class Store:
    """Named bytes below one root URL.

    Args:
        url: a local path or any fsspec URL.

    Raises:
        StoreError: when no driver is installed for the URL.
    """

    def __init__(self, url: str | Path) -> None:
        self.url = str(url).rstrip("/")
        self._fs, root = _file_system(self.url)
        self._root = root.rstrip("/")
        self.local = Path(self._root) if _is_local(self._fs) else None
        """The root as a local directory, or None for an object store."""

    def path(self, name: str) -> str:
        """`name` as the file system sees it."""
        return f"{self._root}/{name}" if name else self._root

    def url_of(self, name: str) -> str:
        """`name` as people and other programs see it."""
        return f"{self.url}/{name}"

    def read_bytes(self, name: str) -> bytes:
        """The whole content. Raises FileNotFoundError."""
        return self._fs.cat_file(self.path(name))

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write whole, replacing what was there; never seen half-written."""
        if self.local is None:
            self._fs.pipe_file(self.path(name), data)
            return
        temporary = self._write_beside(name, data)
        os.replace(temporary, self.path(name))

    def create(self, name: str, data: bytes) -> bool:
        """Write only if `name` does not exist; True when this call created it.

        Atomic on local disks and on object stores with conditional writes. Where a store has none
        the last writer wins, which every caller must survive (see `artifacts.publish`).
        """
        if self.local is not None:
            temporary = self._write_beside(name, data)
            try:
                os.link(temporary, self.path(name))
            except FileExistsError:
                return False
            finally:
                os.unlink(temporary)
            return True
        try:
            self._fs.pipe_file(self.path(name), data, mode="create")
        except FileExistsError:
            return False
        except NotImplementedError:
            if self.exists(name):
                return False
            self._fs.pipe_file(self.path(name), data)
        except OSError as error:
            # radosgw and Swift answer a lost conditional write with 412 without the element that
            # s3fs looks for, and it becomes EINVAL (measured, platform.md part D).
            if error.errno != errno.EINVAL:
                raise
            return False
        return True

    def _write_beside(self, name: str, data: bytes) -> str:
        path = self.path(name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        temporary = f"{path}.{uuid.uuid4().hex}.tmp"
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return temporary

    def exists(self, name: str) -> bool:
        """Whether a file of that name is there."""
        return self._fs.exists(self.path(name))

    def sizes(self, prefix: str) -> dict[str, int]:
        """{name relative to `prefix`: size in bytes} of all files below it."""
        base = self.path(prefix)
        found = self._fs.find(base, detail=True)
        return {name[len(base) + 1 :]: info["size"] for name, info in found.items()}

    def folders(self, prefix: str) -> list[str]:
        """Names of the directories directly below `prefix`, sorted."""
        try:
            entries = self._fs.ls(self.path(prefix), detail=True)
        except FileNotFoundError:
            return []
        paths = [entry["name"].rstrip("/") for entry in entries if entry["type"] == "directory"]
        return sorted(path.rsplit("/", 1)[-1] for path in paths)

    def put_files(self, pairs: Sequence[tuple[Path, str]], link: bool = False) -> None:
        """Upload (local file, name) pairs.

        Args:
            link: on a local disk, make hard links where possible. Only for files that nobody
                changes afterwards: both names then share their bytes.
        """
        _in_parallel(lambda pair: self._put(pair[0], pair[1], link), pairs)

    def _put(self, source: Path, name: str, link: bool) -> None:
        if self.local is None:
            self._fs.put_file(str(source), self.path(name))
            return
        target = Path(self.path(name))
        target.parent.mkdir(parents=True, exist_ok=True)
        if link:
            try:
                os.link(source, target)
                return
            except OSError:
                pass  # another file system, or one without links: copy below
        shutil.copyfile(source, target)

    def get_files(self, pairs: Sequence[tuple[str, Path]]) -> None:
        """Download (name, local file) pairs."""
        for _, target in pairs:
            target.parent.mkdir(parents=True, exist_ok=True)
        _in_parallel(lambda pair: self._fs.get_file(self.path(pair[0]), str(pair[1])), pairs)

    def remove(self, prefix: str) -> None:
        """Remove a file, or all that lies below a prefix; nothing there is not an error."""
        try:
            self._fs.rm(self.path(prefix), recursive=True)
        except FileNotFoundError:
            return

    def check_writable(self) -> None:
        """Write and remove a small file.

        Raises:
            StoreError: naming the URL, the reason and the remedy.
        """
        probe = f".write-test-{uuid.uuid4().hex}"
        try:
            self.write_bytes(probe, b"")
            self.remove(probe)
        except Exception as error:
            raise StoreError(
                f"cannot write to the store {self.url}: {error}. Check the path, the permissions "
                "and the free space, or choose another with REGROW_STORE or the recipe key `store`"
            ) from error


def _in_parallel(work: Any, items: Iterable[Any]) -> None:
    with ThreadPoolExecutor(_TRANSFERS) as pool:
        for _ in pool.map(work, items):
            pass
