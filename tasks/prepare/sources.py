"""From `datasets[].path` to an ordered list of files, and what identifies them.

Runs while a plan is made, so it reads at most a card and imports nothing heavy.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from regrow.infra import hub, store
from regrow.infra.digests import DigestMemo
from regrow.tasks.prepare.folders import (
    CARD,
    COMPRESSED,
    FILE_TYPES,
    KIND_OF_ENDING,
    card_patterns,
    ending,
    files_of_split,
    folders,
    holds_data,
    is_http,
    matching,
)
from regrow.tasks.prepare.slices import parse_splits
from regrow.tasks.stage import StageError, fingerprint

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_URL = "hf://datasets/"


def resolve(
    path: str,
    data_files: Sequence[str] = (),
    ds_type: str | None = None,
    *,
    split: str = "train",
    name: str | None = None,
    revision: str | None = None,
    key: str = "datasets.0",
    streaming: bool = False,
) -> list[str]:
    """The files that a recipe's dataset means, in the order they are read.

    Args:
        path: file, directory, glob, URL, hub name, or a file type whose files are in `data_files`.
        split: name of one split, without rows.
        key: where the dataset stands in the recipe, for errors.
        streaming: leave files of the hub where they are.

    Raises:
        StageError: when nothing is there, naming the key and the remedy.
        HubError: when it is a hub name and the hub cannot be reached.
    """
    if path in FILE_TYPES and data_files and not Path(path).exists():
        _check_split_of_files(split, key)
        return matching(data_files, "", f"{key}.data_files")
    if not store.is_url(path):
        path = str(Path(path).expanduser())
        if _is_hub_name(path):
            place = hub.pin(path, revision, "dataset", f"{key}.path")
            wanted = (place, data_files, name, split, key)
            path = _hub_url(place) if streaming else _download(*wanted)
    named = bool(data_files) or _is_pattern(path) or ending(path) in KIND_OF_ENDING
    found = [] if named else store.expand(path)
    if not named and found not in ([path], [str(Path(path).absolute())]):
        return files_of_split(path, ds_type, split, name, key)
    _check_split_of_files(split, key)
    if data_files:
        return matching(data_files, path, f"{key}.data_files")
    return found or matching([path], "", f"{key}.path")


def _check_split_of_files(split: str, key: str) -> None:
    """Files that the recipe names itself are one split, which `datasets` too calls train."""
    if split != "train":
        raise StageError(
            f"{key}.split: {split!r} does not choose among files that the recipe names itself. "
            "Leave `split` out or write train (rows: train[:10%]), or give the folder or hub "
            "dataset in which the split is"
        )


def identified(
    dataset: Any, key: str, memo: DigestMemo, streaming: bool = False
) -> list[dict[str, str]]:
    """For each part of a recipe's dataset {place: digest}, in the order in which files are read.

    Raises:
        StageError: for a split or files that are not there or cannot be read.
        HubError: when the hub is needed and cannot be reached.
    """
    found = []
    for split, _ in parse_splits(dataset.split, key):
        places = resolve(
            dataset.path,
            dataset.data_files,
            dataset.ds_type,
            split=split,
            name=dataset.name,
            revision=dataset.revision,
            key=key,
            streaming=streaming,
        )
        try:
            found.append({place: identity(place, memo, streaming) for place in places})
        except OSError as error:
            raise StageError(
                f"{key}.path: {dataset.path} cannot be read ({error}). Check the path, the "
                "permissions and the network"
            ) from error
    return found


def identity(place: str, memo: DigestMemo, streaming: bool = False) -> str:
    """What a file is, 64 hex digits: sha256 of its bytes, so that its place does not matter.

    A remote file that is only read as far as it is needed cannot be hashed: there it is the sha256
    of its URL with the commit (on the hub), or of (URL, size, etag). A file system that tells
    nothing like an etag leaves only the bytes.

    Raises:
        OSError: when the file cannot be read.
    """
    if not (streaming and store.is_url(place)):
        return memo.sha256(place)
    return stream_identity(place) or memo.sha256(place)


def stream_identity(url: str) -> str | None:
    """Identity of a remote file that is not read; None where its file system tells none."""
    if url.startswith(_HUB_URL):
        return fingerprint({"url": url})
    size, mark = store.identity(url)
    return fingerprint({"url": url, "size": size, "mark": mark}) if mark else None


def _hub_url(place: str) -> str:
    repo_id, commit = hub.split_place(place)
    return f"{_HUB_URL}{repo_id}@{commit}"


def _download(place: str, data_files: Sequence[str], name: str | None, split: str, key: str) -> str:
    """A local directory with a hub dataset's files; with those of one split where it tells."""
    if data_files:
        return str(hub.local_directory(place, "dataset", list(data_files)))
    card = hub.local_directory(place, "dataset", [CARD]) / CARD
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    patterns = card_patterns(text, split, name, key)
    if patterns:
        return str(hub.local_directory(place, "dataset", [CARD, *patterns]))
    ends = [f"{end}{packed}" for end in KIND_OF_ENDING for packed in ("", *COMPRESSED)]
    root = ""
    for pattern in (f"*{split}*", "*"):
        wanted = [f"{folder}{pattern}{end}" for end in ends for folder in folders(name) or ("",)]
        root = str(hub.local_directory(place, "dataset", wanted))
        if holds_data(root):
            break
    return root


def _is_hub_name(path: str) -> bool:
    if Path(path).exists() or path.startswith((".", "/")) or _is_pattern(path):
        return False
    return bool(_HUB_NAME.fullmatch(path)) and ending(path) not in KIND_OF_ENDING


def _is_pattern(path: str) -> bool:
    return not is_http(path) and any(mark in path for mark in "*?[")
