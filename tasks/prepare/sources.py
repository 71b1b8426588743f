"""From `datasets[].path` to an ordered list of files, and from `split` to a range of rows.

Runs while a plan is made, so it opens no file and imports nothing heavy.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from regrow.infra import hub, store
from regrow.tasks.stage import StageError

_KIND_OF_ENDING = {
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
    ".text": "text",
}
_COMPRESSED = (".gz", ".bz2", ".xz")
_FILE_TYPES = ("json", "csv", "parquet", "arrow", "text")
# What `datasets.save_to_disk` and hub repositories keep beside the data.
_NOT_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
# Words by which files of a folder are told apart, as the hub does.
_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval"),
}
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_SPLIT = re.compile(r"(?P<name>[\w.-]+)(?:\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")


@dataclass(frozen=True)
class Rows:
    """A range of a dataset's rows: `train[10%:500]` and one of several shards of it."""

    start: str = ""
    """A row number, negative from the end, or a percentage with its sign; empty: the first row."""
    stop: str = ""
    """The same, exclusive; empty: after the last row."""
    shards: int = 1
    shard: int = 0

    def sharded(self, shards: int | None, index: int | None) -> Rows:
        """Part `index` of `shards` parts of these rows."""
        return replace(self, shards=shards or 1, shard=index or 0)

    def bounds(self, total: int) -> tuple[int, int]:
        """(first row, row after the last) of a dataset of `total` rows."""
        low = _bound(self.start, total, 0)
        high = max(low, _bound(self.stop, total, total))
        size, larger = divmod(high - low, self.shards)
        first = low + size * self.shard + min(self.shard, larger)
        return first, first + size + (self.shard < larger)


def _bound(text: str, total: int, default: int) -> int:
    if not text:
        return default
    number = round(int(text[:-1]) * total / 100) if text.endswith("%") else int(text)
    return min(max(number + total if number < 0 else number, 0), total)


def parse_split(text: str, key: str = "datasets.0") -> tuple[str, Rows]:
    """The name and the rows of a split such as `train`, `train[:10%]`, `train[100:-100]`.

    Raises:
        StageError: for any other form.
    """
    match = _SPLIT.fullmatch(text.strip())
    if match is None:
        raise StageError(
            f"{key}.split: {text!r} is not a split; write train, train[:10%] or train[100:200]"
        )
    return match["name"], Rows(match["start"] or "", match["stop"] or "")


def file_kind(place: str, ds_type: str | None = None, key: str = "datasets.0") -> str:
    """How the file at `place` is read: json, jsonl, csv, tsv, parquet, arrow or text.

    Raises:
        StageError: when neither its ending nor `ds_type` says so.
    """
    ending = _ending(place)
    kind = _KIND_OF_ENDING.get(ending)
    if ds_type is None and kind is None:
        raise StageError(
            f"{key}.path: what kind of file is {place}? Its ending {ending!r} does not say. "
            f"Set `{key}.ds_type` to one of {', '.join(_FILE_TYPES)}"
        )
    if ds_type is None or (ds_type, kind) in (("json", "jsonl"), ("csv", "tsv")):
        assert kind is not None
        return kind
    return ds_type


def resolve(
    path: str,
    data_files: Sequence[str] = (),
    ds_type: str | None = None,
    *,
    split: str = "train",
    name: str | None = None,
    revision: str | None = None,
    key: str = "datasets.0",
) -> list[str]:
    """The files that a recipe's dataset means, in the order they are read.

    Args:
        path: file, directory, glob, URL, hub name, or a file type whose files are in `data_files`.
        key: where the dataset stands in the recipe, for errors.

    Raises:
        StageError: when nothing is there, naming the key and the remedy.
        HubError: when it is a hub name and the hub cannot be reached.
    """
    wanted, _ = parse_split(split, key)
    if path in _FILE_TYPES and data_files and not Path(path).exists():
        return _matching(data_files, "", f"{key}.data_files")
    if not store.is_url(path):
        path = str(Path(path).expanduser())
        if _is_hub_name(path):
            root = _download(path, data_files, name, wanted, revision, key)
            return _of_directory(root, data_files, ds_type, wanted, key)
    if data_files:
        return _matching(data_files, path, f"{key}.data_files")
    if _is_pattern(path) or _ending(path) in _KIND_OF_ENDING:
        return _matching([path], "", f"{key}.path")
    found = store.expand(path)
    if found == [path] or found == [str(Path(path).absolute())]:
        return found
    return _of_directory(path, (), ds_type, wanted, key)


def _matching(patterns: Sequence[str], base: str, key: str) -> list[str]:
    files: list[str] = []
    for pattern in patterns:
        whole = pattern if not base or _is_absolute(pattern) else f"{base.rstrip('/')}/{pattern}"
        found = [whole] if _is_http(whole) else store.expand(whole)
        if not found:
            place = whole if store.is_url(whole) else str(Path(whole).absolute())
            raise StageError(f"{key}: there is no file {place}. Check the spelling and the folder")
        files += [file for file in found if file not in files]
    return files


def _of_directory(
    root: str, data_files: Sequence[str], ds_type: str | None, split: str, key: str
) -> list[str]:
    if data_files:
        return _matching(data_files, root, f"{key}.data_files")
    found = store.expand(root)
    if not found:
        raise StageError(
            f"{key}.path: {root} is empty or is not there. Give a file, a directory with data "
            "files, a URL, or the name of a dataset on the Hugging Face hub (owner/name)"
        )
    files = [file for file in found if _is_data(_below(root, file), ds_type)]
    if not files:
        raise StageError(
            f"{key}.path: none of the {len(found)} files in {root} has an ending of "
            f"{', '.join(_KIND_OF_ENDING)}. Set `{key}.data_files`, and `{key}.ds_type` if need be"
        )
    chosen = [file for file in files if file in set(_of_split(root, files, split, key))]
    kinds = {file_kind(file, ds_type, key).replace("jsonl", "json") for file in chosen}
    if len(kinds) > 1:
        raise StageError(
            f"{key}.path: {root} holds files of several kinds ({', '.join(sorted(kinds))}). "
            f"Say which with `{key}.data_files` (a pattern such as '*.jsonl' will do)"
        )
    return chosen


def _of_split(root: str, files: list[str], split: str, key: str) -> list[str]:
    named = {file: _split_of(_below(root, file), split) for file in files}
    exact = [file for file in files if named[file] == split]
    if exact or split == "train":
        chosen = exact or [file for file in files if named[file] is None]
        if chosen:
            return chosen
    raise StageError(
        f"{key}.split: no file in {root} belongs to the split {split!r}; there are "
        f"{', '.join(_below(root, file) for file in files[:8])}. Set `{key}.data_files`"
    )


def _split_of(name: str, wanted: str) -> str | None:
    words = {wanted: (wanted,), **_SPLIT_WORDS}
    for split, its in words.items():
        alternatives = "|".join(map(re.escape, its))
        if re.search(rf"(?:^|[-._/ ])(?:{alternatives})(?=[-./ ]|_?\d|$)", name):
            return split
    return None


def _is_data(name: str, ds_type: str | None) -> bool:
    parts = PurePosixPath(name).parts
    if not parts or parts[-1] in _NOT_DATA or any(part.startswith((".", "_")) for part in parts):
        return False
    kind = _KIND_OF_ENDING.get(_ending(name))
    if kind is None or ds_type is None:
        return kind is not None
    return {"jsonl": "json", "tsv": "csv"}.get(kind, kind) == ds_type


def _download(
    path: str,
    data_files: Sequence[str],
    name: str | None,
    split: str,
    revision: str | None,
    key: str,
) -> str:
    """A local directory with a hub dataset's files; with those of one split where names tell."""
    place = hub.pin(path, revision, "dataset", f"{key}.path")
    if data_files:
        return str(hub.local_directory(place, "dataset", list(data_files)))
    ends = [f"{end}{packed}" for end in _KIND_OF_ENDING for packed in ("", *_COMPRESSED)]
    root = ""
    for pattern in (f"*{split}*", "*"):
        patterns = [f"{folder}{pattern}{end}" for end in ends for folder in _folders(name)]
        root = str(hub.local_directory(place, "dataset", patterns))
        if root and any(_is_data(_below(root, file), None) for file in store.expand(root)):
            break
    inside = [folder for folder in _folders(name) if folder and (Path(root) / folder).is_dir()]
    return str(Path(root) / inside[0]) if inside else root


def _folders(name: str | None) -> tuple[str, ...]:
    return (f"{name}/", f"data/{name}/") if name and name != "default" else ("",)


def _is_hub_name(path: str) -> bool:
    if Path(path).exists() or path.startswith((".", "/")) or _is_pattern(path):
        return False
    return bool(_HUB_NAME.fullmatch(path)) and _ending(path) not in _KIND_OF_ENDING


def _is_pattern(path: str) -> bool:
    return not _is_http(path) and any(mark in path for mark in "*?[")


def _is_http(path: str) -> bool:
    """A web page: it can be read but not listed."""
    return path.startswith(("http://", "https://"))


def _is_absolute(path: str) -> bool:
    return store.is_url(path) or path.startswith(("/", "~"))


def _below(root: str, file: str) -> str:
    """`file` relative to `root`, in whatever form the file system writes either."""
    for start in (root, str(Path(root).absolute())):
        if file.startswith(start.rstrip("/") + "/"):
            return file[len(start.rstrip("/")) + 1 :]
    return file.rsplit("/", 1)[-1]


def _ending(place: str) -> str:
    path = PurePosixPath(place.split("?", 1)[0] if "://" in place else place)
    suffix = path.suffix.lower()
    return PurePosixPath(path.stem).suffix.lower() if suffix in _COMPRESSED else suffix
