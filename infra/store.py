"""Bytes under a root URL, on any fsspec file system. The only importer of fsspec.

Object stores have no rename and no directories, so nothing here relies on either: a name is
written whole, created exclusively, listed by prefix or removed. Listings are never cached (a cached
listing hides what another writer has made since: measured, shared reference platform.md part D).
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, TypeVar, cast

import fsspec
from fsspec.utils import infer_compression

from regrow.infra.remote import TRIES, IncompleteTransfer, StoreError, error_code, patiently
from regrow.infra.settings import s3_endpoint

T = TypeVar("T")

# Transfers of one artifact at a time; object stores answer in tens of milliseconds and are
# latency-bound, so a handful of streams fills a link without exhausting file descriptors.
_TRANSFERS = 8
# Bytes of one request of a large file: with eight files of four parts at once half a gigabyte of
# memory, and far below S3's limit of 10 000 parts for files up to 160 GB (s3fs takes larger parts
# beyond).
_PART = 16 << 20
_PARTS_AT_ONCE = 4

_EXTRA_OF_PROTOCOL = {
    "s3": "s3",
    "s3a": "s3",
    "gs": "gs",
    "gcs": "gs",
    "az": "az",
    "abfs": "az",
    "sftp": "sftp",
}


def is_url(path: str) -> bool:
    """Whether `path` names a file system by protocol ("s3://..."), rather than a local path."""
    return "://" in path


def _file_system(url: str) -> tuple[Any, str]:
    protocol = url.split("://", 1)[0] if is_url(url) else "file"
    try:
        fs, path = fsspec.core.url_to_fs(url, **_options(protocol))
    except ImportError as error:
        extra = _EXTRA_OF_PROTOCOL.get(protocol)
        remedy = f"pip install 'regrow[{extra}]'" if extra else str(error)
        raise StoreError(f"{url}: no driver for {protocol}:// is installed; {remedy}") from error
    except ValueError as error:
        raise StoreError(f"{url}: {error}") from error
    return fs, path


def _options(protocol: str) -> dict[str, Any]:
    if protocol in {"file", "local", "memory", "sftp", "ssh"}:  # the last two know no such option
        return {}
    if protocol not in {"s3", "s3a"}:
        return {"use_listings_cache": False}
    # Credentials and region come the way every S3 client takes them (environment, profile, role).
    # Few tries below us, where a request cannot tell a wrong address from a passing fault.
    retries = {"mode": "standard", "total_max_attempts": 3}
    return {
        "use_listings_cache": False,
        "endpoint_url": s3_endpoint(),
        "config_kwargs": {"retries": retries, "max_pool_connections": _TRANSFERS * _PARTS_AT_ONCE},
    }


def _is_local(fs: Any) -> bool:
    protocols = fs.protocol if isinstance(fs.protocol, (tuple, list)) else (fs.protocol,)
    return bool({"file", "local"} & set(protocols))


def expand(pattern: str) -> list[str]:
    """The files that a path, directory, glob or URL names, sorted; empty when there are none."""
    fs, path = _file_system(pattern)
    found = _asked(fs, pattern, lambda: _found(fs, path))
    if _is_local(fs):
        return sorted(found)
    return sorted(fs.unstrip_protocol(name) for name in found)


def _found(fs: Any, path: str) -> list[str]:
    if any(mark in path for mark in "*?["):
        return [name for name in fs.glob(path) if fs.isfile(name)]
    if fs.isdir(path):
        return fs.find(path)
    return [path] if fs.exists(path) else []


def open_url(url: str, mode: str = "rb") -> IO[Any]:
    """Open a file on any file system; a `.gz`, `.bz2` or `.xz` ending is decompressed."""
    fs, _ = _file_system(url)
    options = {} if _is_local(fs) else _options(url.split("://", 1)[0])
    path = url.split("?", 1)[0] if is_url(url) else url
    opened = fsspec.open(url, mode, compression=infer_compression(path), **options)
    return _asked(fs, url, lambda: cast(IO[Any], cast(fsspec.core.OpenFile, opened).open()))


def open_raw(url: str) -> IO[bytes]:
    """Open a file on any file system for reading its bytes as they are."""
    fs, path = _file_system(url)
    return _asked(fs, url, lambda: fs.open(path, "rb"))


def open_ranges(url: str) -> IO[bytes]:
    """Open a file on any file system for reading ranges of it: just those, nothing ahead."""
    fs, path = _file_system(url)
    # Readers that know what they want ask for all of it; by default fsspec fetches 5 MB each time.
    return _asked(fs, url, lambda: fs.open(path, "rb", cache_type="none"))


def identity(url: str) -> tuple[int, str]:
    """(size in bytes, a mark that changes when the content does: mtime and inode, or etag)."""
    fs, path = _file_system(url)
    if _is_local(fs):
        stat = os.stat(path)
        return stat.st_size, f"{stat.st_mtime_ns}-{stat.st_ino}"
    info = _asked(fs, url, lambda: fs.info(path))
    names = ("ETag", "etag", "md5Hash", "LastModified", "Last-Modified", "mtime")
    mark = next((info[name] for name in names if info.get(name)), "")
    size = info.get("size")
    return -1 if size is None else int(size), str(mark)


def _asked(fs: Any, url: str, work: Callable[[], T]) -> T:
    return work() if _is_local(fs) else patiently(url, work)


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
        self._is_s3 = self.url.split("://", 1)[0] in {"s3", "s3a"}

    def path(self, name: str) -> str:
        """`name` as the file system sees it."""
        return f"{self._root}/{name}" if name else self._root

    def url_of(self, name: str) -> str:
        """`name` as people and other programs see it."""
        return f"{self.url}/{name}"

    def _call(self, work: Callable[[], T], tries: int = TRIES) -> T:
        return work() if self.local is not None else patiently(self.url, work, tries)

    def read_bytes(self, name: str) -> bytes:
        """The whole content. Raises FileNotFoundError."""
        # For s3fs: one request, instead of first asking how large it is.
        options = {"max_concurrency": 1} if self._is_s3 else {}
        return self._call(lambda: self._fs.cat_file(self.path(name), **options))

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write whole, replacing what was there; never seen half-written."""
        self._write(name, data, TRIES)

    def _write(self, name: str, data: bytes, tries: int) -> None:
        if self.local is None:
            self._call(lambda: self._fs.pipe_file(self.path(name), data), tries)
            return
        temporary = self._write_beside(name, data)
        os.replace(temporary, self.path(name))

    def create(self, name: str, data: bytes) -> bool:
        """Write only if `name` does not exist; True when what is there is `data`.

        Atomic on local disks and on object stores with conditional writes. Where a store has none
        the last writer wins, which every caller must survive (see `artifacts.publish`). A request
        whose answer was lost is made again and then finds its own work: so the content decides who
        was first, and `data` must hold something that no other writer has.
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
        if self._call(lambda: self._create_remote(name, data)):
            return True
        try:
            return self.read_bytes(name) == data
        except FileNotFoundError:
            return False  # there a moment ago, and removed since

    def _create_remote(self, name: str, data: bytes) -> bool:
        """One conditional write; False when something was there."""
        try:
            self._fs.pipe_file(self.path(name), data, mode="create")
        except FileExistsError:
            return False
        except NotImplementedError:
            return self._create_unconditionally(name, data)
        except OSError as error:
            # radosgw and Swift answer a lost conditional write with 412 without the element that
            # s3fs looks for, and it becomes EINVAL (measured, platform.md part D).
            code = error_code(error)
            if code in {"PreconditionFailed", "412"}:
                return False
            if code in {"NotImplemented", "501"}:
                return self._create_unconditionally(name, data)
            raise
        return True

    def _create_unconditionally(self, name: str, data: bytes) -> bool:
        if self._fs.exists(self.path(name)):
            return False
        self._fs.pipe_file(self.path(name), data)
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
        return self._call(lambda: self._fs.exists(self.path(name)))

    def sizes(self, prefix: str) -> dict[str, int]:
        """{name relative to `prefix`: size in bytes} of all files below it."""
        base = self.path(prefix)
        found = self._call(lambda: self._fs.find(base, detail=True))
        return {name[len(base) + 1 :]: info["size"] for name, info in found.items()}

    def folders(self, prefix: str) -> list[str]:
        """Names of the directories directly below `prefix`, sorted."""
        try:
            entries = self._call(lambda: self._fs.ls(self.path(prefix), detail=True))
        except FileNotFoundError:
            return []
        paths = [entry["name"].rstrip("/") for entry in entries if entry["type"] == "directory"]
        return sorted(path.rsplit("/", 1)[-1] for path in paths)

    def put_files(self, pairs: Sequence[tuple[Path, str]], link: bool = False) -> None:
        """Upload (local file, name) pairs; large files in parts, several at once.

        Args:
            link: on a local disk, make hard links where possible. Only for files that nobody
                changes afterwards: both names then share their bytes.
        """
        _in_parallel(lambda pair: self._put(pair[0], pair[1], link), pairs)

    def _put(self, source: Path, name: str, link: bool) -> None:
        if self.local is None:
            parts = {"chunksize": _PART, "max_concurrency": _PARTS_AT_ONCE} if self._is_s3 else {}
            self._call(lambda: self._fs.put_file(str(source), self.path(name), **parts))
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

    def get_files(
        self, pairs: Sequence[tuple[str, Path]], sizes: Mapping[str, int] | None = None
    ) -> None:
        """Download (name, local file) pairs; large files in ranges, several at once.

        Args:
            sizes: {name: bytes}, where they are known; the others are asked for.

        Raises:
            FileNotFoundError: when a file is not there, or shorter than `sizes` says.
        """
        known = sizes or {}
        for _, target in pairs:
            target.parent.mkdir(parents=True, exist_ok=True)
        _in_parallel(lambda pair: self._get(pair[0], pair[1], known.get(pair[0])), pairs)

    def _get(self, name: str, target: Path, size: int | None) -> None:
        if self.local is not None:
            shutil.copyfile(self.path(name), target)
            return
        path = self.path(name)
        whole = self._call(lambda: int(self._fs.size(path))) if size is None else size
        with target.open("wb") as out:
            out.truncate(whole)
        starts = range(0, whole, _PART)
        _in_parallel(
            lambda start: self._get_range(path, target, start, whole), starts, _PARTS_AT_ONCE
        )

    def _get_range(self, path: str, target: Path, start: int, size: int) -> None:
        end = min(start + _PART, size)

        def read() -> bytes:
            data = self._fs.cat_file(path, start=start, end=end)
            if len(data) != end - start:
                raise IncompleteTransfer(f"{path}: {len(data)} of {end - start} bytes came")
            return data

        data = self._call(read)
        with target.open("r+b") as out:
            out.seek(start)
            out.write(data)

    def remove(self, prefix: str) -> None:
        """Remove a file, or all that lies below a prefix; nothing there is not an error."""
        try:
            self._call(lambda: self._fs.rm(self.path(prefix), recursive=True))
        except FileNotFoundError:
            return

    def check_writable(self) -> None:
        """Write and remove a small file.

        Raises:
            StoreError: naming the URL, the reason and the remedy.
        """
        probe = f".write-test-{uuid.uuid4().hex}"
        try:
            # Two tries only: who waits at the start of a run wants to hear of a wrong address.
            self._write(probe, b"", tries=2)
            self.remove(probe)
        except Exception as error:
            why = str(error).removeprefix(f"{self.url}: ")
            raise StoreError(
                f"cannot write to the store {self.url}: {why}. Check the path, the permissions "
                "and the free space, or choose another with REGROW_STORE or the recipe key `store`"
            ) from error


def _in_parallel(
    work: Callable[[Any], Any], items: Iterable[Any], at_once: int = _TRANSFERS
) -> None:
    pending = list(items)
    if len(pending) == 1:
        work(pending[0])
        return
    with ThreadPoolExecutor(at_once) as pool:
        for _ in pool.map(work, pending):
            pass
