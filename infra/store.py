"""Bytes under a root URL, on any fsspec file system. The only importer of fsspec.

Object stores have no rename and no directories, so nothing here relies on either: a name is
written whole, created exclusively, listed by prefix or removed. Listings are never cached (a cached
listing hides what another writer has made since: measured, shared reference platform.md part D).
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import IO, Any, TypeVar, cast

import fsspec
from fsspec.compression import compr
from fsspec.utils import glob_translate, infer_compression

from regrow.infra.listing import Entry, entry_of, files_below, info_of
from regrow.infra.parallel import in_parallel, set_when_left
from regrow.infra.patient_file import PatientFile, read_range
from regrow.infra.remote import TRIES, StoreError, answered_soon, error_code, heard, patiently
from regrow.infra.secrets import mask_secrets
from regrow.infra.settings import NO_PASSWORD, s3_endpoint

T = TypeVar("T")

# Transfers of one artifact at a time; object stores answer in tens of milliseconds and are
# latency-bound, so a handful of streams fills a link without exhausting file descriptors.
_TRANSFERS = 8
# Bytes of one request of a large file: with eight files of four parts at once half a gigabyte of
# memory, and far below S3's limit of 10 000 parts for files up to 160 GB (s3fs takes larger parts
# beyond).
_PART = 16 << 20
_PARTS_AT_ONCE = 4
# Bytes that reading a file from its beginning fetches at a time: at 50 ms an answer, 160 MB/s.
_BLOCK = 8 << 20

# What has no folders: there a name is written whole, so that no reader sees half of it. Everywhere
# else it is written beside and renamed.
_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "adl", "memory"}
# A connection of paramiko's answers one thread at a time: two that ask at once wait for ever.
_ONE_THREAD = {"sftp", "ssh"}
# user:password@, where the password may have a slash, as keys of S3 have; not a port.
_WITH_PASSWORD = re.compile(r"[^/:@]*:(?!\d+(/|$))[^@]*@")
_MAGIC = re.compile(r"[*?[]")
_WITH_HOST = {"sftp", "ssh", "ftp", "smb"}
# Servers that may know neither a file's size nor how to give a part of it.
_STREAMS = {"http", "https"}

_EXTRAS = {x: x for x in ("s3", "gs", "az", "sftp")} | {"s3a": "s3", "gcs": "gs", "abfs": "az"}


def is_url(path: str) -> bool:
    """Whether `path` names a file system by protocol ("s3://..."), rather than a local path."""
    return "://" in path


def _file_system(url: str) -> tuple[Any, str]:
    protocol = url.split("://", 1)[0] if is_url(url) else "file"
    if is_url(url) and _WITH_PASSWORD.match(url.split("://", 1)[1]):
        raise StoreError(f"{mask_secrets(url)}: {NO_PASSWORD}")
    try:
        if protocol not in _ONE_THREAD:
            return fsspec.core.url_to_fs(url, **_options(protocol))
        _, path = patiently(url, lambda: _connected(url))
        return _OfThisThread(url), path
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        remedy = f"pip install 'regrow[{extra}]'" if extra else str(error)
        raise StoreError(f"{url}: no driver for {protocol}:// is installed; {remedy}") from error
    except ValueError as error:
        raise error if isinstance(error, StoreError) else StoreError(f"{url}: {error}") from error


class _OfThisThread:
    """A file system whose connection belongs to the thread that asks: fsspec keeps one for each."""

    def __init__(self, url: str) -> None:
        self._url = url

    def __getattr__(self, name: str) -> Any:
        return getattr(_connected(self._url)[0], name)


def _connected(url: str) -> tuple[Any, str]:
    """This thread's file system, connected anew where its connection was lost."""
    fs, path = fsspec.core.url_to_fs(url)
    transport = fs.client.get_transport()
    if transport is None or not transport.is_active():
        fs.clear_instance_cache()  # the others of this process connect again too, one by one
        fs, path = fsspec.core.url_to_fs(url)
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


def require_reachable(url: str) -> None:
    """Raises StoreError when nothing answers where a URL points; a refusal is an answer."""
    fs, path = _file_system(url)
    if not _is_local(fs) and not isinstance(fs, _OfThisThread):  # that one has connected
        heard(url, lambda: fs.info(_MAGIC.split(path, maxsplit=1)[0]))


def expand(pattern: str) -> list[str]:
    """The files that a path, directory, glob or URL names, sorted; empty when there are none."""
    require_reachable(pattern)
    fs, path = _file_system(pattern)
    protocol, _, rest = pattern.partition("://")
    found = _asked(fs, pattern, lambda: _found(fs, path, protocol))
    if _is_local(fs):
        return sorted(found)
    if protocol in _WITH_HOST:  # of which their names do not tell
        return sorted(f"{protocol}://{rest.partition('/')[0]}{name}" for name in found)
    return sorted(fs.unstrip_protocol(name) for name in found)


def _found(fs: Any, path: str, protocol: str) -> list[str]:
    if _MAGIC.search(path):
        names = fs.glob(path) if protocol in _OBJECT_STORES | _STREAMS else _matching(fs, path)
        return [name for name in names if (info_of(fs, name) or {}).get("type") == "file"]
    if protocol in _STREAMS:  # a page of links is a folder there, and a file too
        return fs.find(path) if fs.isdir(path) else [path] if fs.exists(path) else []
    if protocol not in _OBJECT_STORES:
        return list(files_below(fs, path))
    info = info_of(fs, path)
    return [] if info is None else fs.find(path) if info["type"] == "directory" else [path]


def _matching(fs: Any, pattern: str) -> list[str]:
    """As `fs.glob`, which takes folders that cannot be listed for empty ones."""
    fixed = _MAGIC.split(pattern, maxsplit=1)[0]
    root = fixed.rpartition("/")[0] or fixed[:1]
    depth = None if "**" in pattern else pattern.count("/") - fixed.count("/") + 1
    matches = re.compile(glob_translate(pattern)).match
    return [name for name in files_below(fs, root, depth) if matches(name)]


def open_url(url: str) -> IO[bytes]:
    """Open a file on any file system for reading; a `.gz`, `.bz2` or `.xz` ending is decompressed.

    Of a remote file every request is made again after faults that pass.
    """
    raw = open_raw(url)
    compression = infer_compression(url.split("?", 1)[0] if is_url(url) else url)
    # fsspec's table of decompressing readers is typed by its first entry, {None: ...}.
    readers = cast(dict[str, Callable[..., IO[bytes]]], compr)
    return readers[compression](raw, mode="rb") if compression else raw


def open_raw(url: str) -> IO[bytes]:
    """Open a file on any file system for reading its bytes as they are, likewise."""
    raw = open_ranges(url)
    return io.BufferedReader(raw, _BLOCK) if isinstance(raw, PatientFile) else raw


def open_ranges(url: str) -> IO[bytes]:
    """Open a file on any file system for reading ranges of it: just those, nothing ahead."""
    fs, path = _file_system(url)
    if _is_local(fs) or url.split("://", 1)[0] in _STREAMS:
        return _asked(fs, url, lambda: fs.open(path, "rb"))
    size = _asked(fs, url, lambda: int(fs.size(path)))
    return cast(IO[bytes], PatientFile(fs, path, url, size))


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
        protocol = self.url.split("://", 1)[0]
        self._is_s3 = protocol in {"s3", "s3a"}
        self._has_folders = protocol not in _OBJECT_STORES

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
            self._call(lambda: self._write_remote(name, data), tries)
            return
        temporary = self._write_beside(name, data)
        os.replace(temporary, self.path(name))

    def _write_remote(self, name: str, data: bytes) -> None:
        path = self.path(name)
        if not self._has_folders:
            self._fs.pipe_file(path, data)
            return
        temporary = f"{path}.{uuid.uuid4().hex}.tmp"
        self._make_folder_of(path)
        self._fs.pipe_file(temporary, data)
        self._fs.mv(temporary, path)

    def _make_folder_of(self, path: str) -> None:
        folder = path.rpartition("/")[0]
        for left in reversed(range(folder.count("/") + 1)):
            try:
                self._fs.makedirs(folder, exist_ok=True)
                return
            except OSError:  # others may have made it, or one above it, at this moment
                if self._fs.isdir(folder):
                    return
                if not left:
                    raise

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
        if self._has_folders:
            return self._create_unconditionally(name, data)
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
        """Look, write and look again: two writers of one moment may both be told that they won."""
        if info_of(self._fs, self.path(name)) is not None:
            return False
        self._write_remote(name, data)
        return self._fs.cat_file(self.path(name)) == data

    def _write_beside(self, name: str, data: bytes) -> str:
        path = self.path(name)
        temporary = f"{path}.{uuid.uuid4().hex}.tmp"
        os.makedirs(os.path.dirname(path), exist_ok=True)
        try:
            file = open(temporary, "wb")  # noqa: SIM115 (closed below)
        except FileNotFoundError:  # another process's `prune` took the empty folder
            os.makedirs(os.path.dirname(path), exist_ok=True)
            file = open(temporary, "wb")  # noqa: SIM115
        with file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return temporary

    def exists(self, name: str) -> bool:
        """Whether a file of that name is there."""
        return self._call(lambda: info_of(self._fs, self.path(name)) is not None)

    def sizes(self, prefix: str) -> dict[str, int]:
        """{name relative to `prefix`: size in bytes} of all files below it."""
        return {name: entry.size for name, entry in self.entries(prefix).items()}

    def entries(self, prefix: str) -> dict[str, Entry]:
        """{name relative to `prefix`: size and time} of all files below it."""
        base = self.path(prefix)
        return {name[len(base) + 1 :]: entry_of(info) for name, info in self._files(base).items()}

    def _files(self, path: str) -> Mapping[str, Mapping[str, Any]]:
        if self._has_folders:
            return self._call(lambda: files_below(self._fs, path))
        return self._call(lambda: self._fs.find(path, detail=True))

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
        in_parallel(lambda pair: self._put(pair[0], pair[1], link), pairs, _TRANSFERS)

    def _put(self, source: Path, name: str, link: bool) -> None:
        if self.local is None:
            parts = {"chunksize": _PART, "max_concurrency": _PARTS_AT_ONCE} if self._is_s3 else {}
            if self._has_folders:
                self._call(lambda: self._make_folder_of(self.path(name)))
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
        stop = threading.Event()

        def get(pair: tuple[str, Path]) -> None:
            with set_when_left(stop):
                self._get(*pair, known.get(pair[0]), stop)

        in_parallel(get, pairs, _TRANSFERS, stop)

    def _get(self, name: str, target: Path, size: int | None, stop: threading.Event) -> None:
        if self.local is not None:
            shutil.copyfile(self.path(name), target)
            return
        path = self.path(name)
        whole = self._call(lambda: int(self._fs.size(path))) if size is None else size
        with target.open("wb") as out:
            out.truncate(whole)
        starts = range(0, whole, _PART)

        def get_range(start: int) -> None:
            if not stop.is_set():  # else the error or the Ctrl-C that set it is on its way up
                self._get_range(path, target, start, whole)

        in_parallel(get_range, starts, _PARTS_AT_ONCE, stop)

    def _get_range(self, path: str, target: Path, start: int, size: int) -> None:
        end = min(start + _PART, size)
        data = self._call(lambda: read_range(self._fs, path, start, end))
        with target.open("r+b") as out:
            out.seek(start)
            out.write(data)

    def remove(self, prefix: str) -> None:
        """Remove a file, or all that lies below a prefix; nothing there is not an error.

        Raises:
            StoreError: when something that was there cannot be removed.
        """
        path = self.path(prefix)
        if self.local is not None:
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm(path, recursive=True)
            return
        there = list(self._files(path))
        if there or not self._is_s3:
            with contextlib.suppress(FileNotFoundError):
                # What is known is not listed once more.
                what = there if self._is_s3 else path
                self._call(lambda: self._fs.rm(what, recursive=not self._is_s3))
        # S3 answers a removal of many names with success and tells of each refusal within, which
        # s3fs passes over. Removed alone, a name's refusal is an error, and a passing one passes.
        left = set(there) & set(self._files(path)) if there else set()
        for name in sorted(left):
            with contextlib.suppress(FileNotFoundError):
                self._call(lambda name=name: self._fs.rm_file(name))

    def prune(self, name: str) -> None:
        """Remove a directory that holds nothing; object stores have no directories."""
        if self._has_folders or self._fs.protocol == "memory":
            with contextlib.suppress(OSError):  # not empty, or not there
                self._fs.rmdir(self.path(name))

    @cached_property
    def id(self) -> str:
        """A name that this store has and no other, made when first asked for."""
        name = "store-id"
        if not self.exists(name):
            self.create(name, uuid.uuid4().hex.encode())
        return self.read_bytes(name).decode()

    def check_writable(self) -> None:
        """Write and remove a small file.

        Raises:
            StoreError: naming the URL, the reason and the remedy.
        """
        probe = f".write-test-{uuid.uuid4().hex}"
        try:
            # Soon, and two tries only: who waits at the start of a run wants to hear of a wrong
            # address, or of a server that takes what is sent and never says that it has it.
            answered_soon(self.url, lambda: self._write(probe, b"", tries=2))
            self.remove(probe)
        except Exception as error:
            why = str(error).removeprefix(f"{self.url}: ")
            raise StoreError(
                f"cannot write to the store {self.url}: {why}. Check the path, the permissions "
                "and the free space, or choose another with REGROW_STORE or the recipe key `store`"
            ) from error
