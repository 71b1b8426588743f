"""Copy a model to where people use it, and tell later whether it is still there.

Files go first and the model card last, so a card means that the model beside it is whole. What an
earlier delivery left and this one does not bring is removed (old shards would else be loaded with
new ones); files that Regrow did not bring are not touched.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from regrow.infra.store import Store, StoreError
from regrow.tasks.stage import Reporter, StageError

CARD = "README.md"
MANIFEST = "regrow-delivery.json"
"""{file: bytes} of what Regrow brought, beside the files."""


def deliver(target: str, files: Mapping[str, Path], card: str, report: Reporter) -> dict[str, int]:
    """Copy `files` ({name: local file}) and the card to `target`; {name: size in bytes} of all.

    Raises:
        StageError: when the target cannot be written, or has not got what was sent.
    """
    store = Store(target)
    sizes = {name: path.stat().st_size for name, path in sorted(files.items())}
    report.log(f"copying {len(sizes)} files, {sum(sizes.values()) / 1e6:,.1f} MB, to {target}")
    try:
        earlier = _manifest(store)
        store.remove(CARD)
        for name in sorted(set(earlier) - set(sizes) - {CARD}):
            store.remove(name)
        store.put_files([(path, name) for name, path in files.items()])
        _require(store, sizes)
        sizes[CARD] = len(card.encode())
        store.write_bytes(MANIFEST, json.dumps(sizes, indent=1).encode())
        store.write_bytes(CARD, card.encode())
    except (OSError, StoreError) as error:
        raise StageError(
            f"output_dir: cannot write to {target}: {error}. Check the path, the permissions and "
            "the free space, or name another output_dir"
        ) from error
    return sizes


def _manifest(store: Store) -> dict[str, int]:
    try:
        return json.loads(store.read_bytes(MANIFEST))
    except (FileNotFoundError, NotADirectoryError):
        return {}


def _require(store: Store, sizes: Mapping[str, int]) -> None:
    wrong = _difference(store, sizes)
    if wrong is not None:
        raise StageError(f"output_dir: after copying to {store.url}, {wrong}; run again")


def _difference(store: Store, sizes: Mapping[str, int]) -> str | None:
    """The first file that is missing or has another size, in words."""
    there = store.sizes("")
    for name, size in sizes.items():
        if name not in there:
            return f"{name} is missing"
        if there[name] != size:
            return f"{name} has {there[name]} bytes instead of {size}"
    return None


def why_undelivered(result: Mapping[str, Any]) -> str | None:
    """Why a recorded delivery no longer holds (a file gone or of another size), or None.

    Args:
        result: what the publish stage returned. What is on the hub is not looked at.
    """
    target = result.get("output_dir")
    if not target:
        return None
    wrong = _difference(Store(target), result["files"])
    return wrong and f"in {target}, {wrong}"
