"""A local copy of a model that lies below an fsspec URL; a file is downloaded once."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import uuid
from collections.abc import Sequence
from pathlib import Path

from regrow.infra.digests import DigestMemo
from regrow.infra.settings import load_settings
from regrow.infra.store import Store, StoreError, identity, require_reachable


def files_at(url: str) -> list[str]:
    """Names of the files directly below a URL, sorted."""
    require_reachable(url)
    try:
        return sorted(name for name in Store(url).sizes("") if name and "/" not in name)
    except FileNotFoundError:
        return []


def local_copy(url: str, patterns: Sequence[str] | None = None) -> Path:
    """A directory with the files directly below `url` whose names match; read it, never write.

    The directory belongs to what the files are now: when one of them changes, it is another.

    Raises:
        StoreError: when the store refuses or does not answer.
    """
    store = Store(url)
    versions = {name: identity(store.url_of(name)) for name in files_at(url)}
    text = json.dumps([store.url, versions], sort_keys=True)
    folder = load_settings().home / "models" / hashlib.sha256(text.encode()).hexdigest()[:32]
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [name for name in versions if _matches(name, patterns)]
    missing = [name for name in wanted if not (folder / name).is_file()]
    partial = {name: folder / f".{uuid.uuid4().hex}.partial" for name in missing}
    try:
        sizes = {name: versions[name][0] for name in missing if versions[name][0] >= 0}
        store.get_files(list(partial.items()), sizes)
        if {name: identity(store.url_of(name)) for name in missing} != {
            name: versions[name] for name in missing
        }:
            raise StoreError(f"{url} changed while it was copied; run again")
        for name, path in partial.items():
            os.replace(path, folder / name)
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)
    return folder


def memo_of_copies() -> DigestMemo:
    """Remembered digests of this machine's copies: each is hashed once, not in every stage."""
    return DigestMemo(load_settings().home / "digests.sqlite")


def _matches(name: str, patterns: Sequence[str] | None) -> bool:
    return patterns is None or any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
