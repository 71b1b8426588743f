"""From a folder of data to the files of one split: by its card, by `save_to_disk`, or by name."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from regrow.infra import store
from regrow.tasks.stage import StageError

KIND_OF_ENDING = {
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
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
FILE_TYPES = ("json", "csv", "parquet", "arrow", "text")
CARD = "README.md"
"""Where a hub dataset says which files belong to which configuration and split."""
# What `datasets.save_to_disk` and hub repositories keep beside the data.
_NOT_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
# Words by which files of a folder are told apart, as the hub does.
_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval"),
}
_FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*(?:\n|\Z)", re.DOTALL)


def ending(place: str) -> str:
    """The file ending that says what is inside, in lower case: .json for a.JSON.gz."""
    path = PurePosixPath(place.split("?", 1)[0] if "://" in place else place)
    suffix = path.suffix.lower()
    return PurePosixPath(path.stem).suffix.lower() if suffix in COMPRESSED else suffix


def file_kind(place: str, ds_type: str | None = None, key: str = "datasets.0") -> str:
    """How the file at `place` is read: json, jsonl, csv, tsv, parquet, arrow or text.

    Raises:
        StageError: when neither its ending nor `ds_type` says so.
    """
    kind = KIND_OF_ENDING.get(ending(place))
    if ds_type is None and kind is None:
        raise StageError(
            f"{key}.path: what kind of file is {place}? Its ending {ending(place)!r} does not say. "
            f"Set `{key}.ds_type` to one of {', '.join(FILE_TYPES)}"
        )
    if ds_type is None or (ds_type, kind) in (("json", "jsonl"), ("csv", "tsv")):
        assert kind is not None
        return kind
    return ds_type


def files_of_split(
    root: str, ds_type: str | None, split: str, name: str | None, key: str
) -> list[str]:
    """The data files of a folder that belong to `split`, in order.

    Args:
        root: local directory or URL.
        name: the configuration, for a folder that has several.

    Raises:
        StageError: when there are none, or they cannot be told apart.
    """
    found = {below(root, file): file for file in store.expand(root)}
    if not found:
        raise StageError(
            f"{key}.path: {root} is empty or is not there. Give a file, a directory with data "
            "files, a URL, or the name of a dataset on the Hugging Face hub (owner/name)"
        )
    if "dataset_dict.json" in found:
        return _of_dataset_dict(root, found, split, key)
    if "state.json" in found:
        return _of_state(found["state.json"])
    patterns = card_patterns(_text(found[CARD]), split, name, key) if CARD in found else None
    if patterns:
        return matching(patterns, root, f"{key}.path")
    inside = [folder for folder in folders(name) if any(f.startswith(folder) for f in found)]
    if inside:
        found = {f.removeprefix(inside[0]): p for f, p in found.items() if f.startswith(inside[0])}
    return _by_name(root, found, ds_type, split, key)


def _by_name(
    root: str, found: Mapping[str, str], ds_type: str | None, split: str, key: str
) -> list[str]:
    data = [name for name in found if _is_data(name, ds_type)]
    if not data:
        raise StageError(
            f"{key}.path: none of the {len(found)} files in {root} has an ending of "
            f"{', '.join(KIND_OF_ENDING)}. Set `{key}.data_files`, and `{key}.ds_type` if need be"
        )
    chosen = [found[name] for name in _of_split(root, data, split, key)]
    kinds = {file_kind(file, ds_type, key).replace("jsonl", "json") for file in chosen}
    if len(kinds) > 1:
        raise StageError(
            f"{key}.path: {root} holds files of several kinds ({', '.join(sorted(kinds))}). "
            f"Say which with `{key}.data_files` (a pattern such as '*.jsonl' will do)"
        )
    return chosen


def _of_split(root: str, names: list[str], split: str, key: str) -> list[str]:
    belongs = {name: _split_of(name, split) for name in names}
    exact = [name for name in names if belongs[name] == split]
    if exact or split == "train":
        chosen = exact or [name for name in names if belongs[name] is None]
        if chosen:
            return chosen
    raise StageError(
        f"{key}.split: no file in {root} belongs to the split {split!r}; there are "
        f"{', '.join(names[:8])}. Set `{key}.data_files`"
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
    kind = KIND_OF_ENDING.get(ending(name))
    if kind is None or ds_type is None:
        return kind is not None
    return {"jsonl": "json", "tsv": "csv"}.get(kind, kind) == ds_type


def holds_data(root: str) -> bool:
    """Whether a folder holds any file that could be data."""
    return any(_is_data(below(root, file), None) for file in store.expand(root))


def _of_dataset_dict(root: str, found: Mapping[str, str], split: str, key: str) -> list[str]:
    """A `DatasetDict` saved with `save_to_disk`: one folder for each split."""
    splits = json.loads(_text(found["dataset_dict.json"])).get("splits", [])
    if split not in splits:
        raise StageError(
            f"{key}.split: {root} was saved with the splits {', '.join(map(str, splits))}, and not "
            f"{split!r}"
        )
    return _of_state(found[f"{split}/state.json"])


def _of_state(state: str) -> list[str]:
    """A `Dataset` saved with `save_to_disk`: its state names its files, caches lie beside them."""
    files = json.loads(_text(state))["_data_files"]
    base = state.rsplit("/", 1)[0]
    return [f"{base}/{file['filename']}" for file in files]


def card_patterns(card: str, split: str, name: str | None, key: str) -> list[str] | None:
    """What a dataset's card says of the files of a split; None where it says nothing.

    Raises:
        StageError: for a configuration or split that the card does not have.
    """
    declared = [c for c in _front_matter(card).get("configs") or () if isinstance(c, dict)]
    configs = {str(c.get("config_name", "default")): c for c in declared}
    if not configs:
        return None
    chosen = name or _default(configs)
    if chosen is None:
        raise StageError(
            f"{key}.name: the dataset has several configurations and no default one. Set "
            f"`{key}.name` to one of {', '.join(configs)}"
        )
    # Without such a configuration a folder of that name may be there all the same.
    return _patterns(configs[chosen], split, key) if chosen in configs else None


def _default(configs: Mapping[str, dict[str, Any]]) -> str | None:
    marked = [name for name, config in configs.items() if config.get("default")]
    if marked or "default" in configs:
        return (marked or ["default"])[0]
    return next(iter(configs)) if len(configs) == 1 else None


def _patterns(config: Mapping[str, Any], split: str, key: str) -> list[str] | None:
    files = config.get("data_files")
    base = str(config.get("data_dir") or "").rstrip("/")
    if not files:
        return None
    if isinstance(files, str) or all(isinstance(file, str) for file in files):
        by_split = {"train": files}
    elif isinstance(files, Mapping):
        by_split = dict(files)
    else:
        by_split = {str(its.get("split", "train")): its.get("path") for its in files}
    if split not in by_split:
        raise StageError(
            f"{key}.split: the dataset has no split {split!r}; it has {', '.join(by_split)}"
        )
    patterns = by_split[split]
    listed = [patterns] if isinstance(patterns, str) else list(patterns or ())
    return [f"{base}/{pattern}" if base else str(pattern) for pattern in listed]


def _front_matter(card: str) -> dict[str, Any]:
    import yaml  # late: few plans need it

    match = _FRONT_MATTER.match(card)
    try:
        data = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        return {}  # a text that is no card: file names have to do
    return data if isinstance(data, dict) else {}


def folders(name: str | None) -> tuple[str, ...]:
    """Where the files of a configuration may lie, below a dataset's folder."""
    return (f"{name}/", f"data/{name}/") if name and name != "default" else ()


def matching(patterns: Sequence[str], base: str, key: str) -> list[str]:
    """The files that patterns name, relative to `base` where they are not absolute.

    Raises:
        StageError: when one of them names none.
    """
    files: list[str] = []
    for pattern in patterns:
        whole = pattern if not base or _is_absolute(pattern) else f"{base.rstrip('/')}/{pattern}"
        found = [whole] if is_http(whole) else store.expand(whole)
        if not found:
            place = whole if store.is_url(whole) else str(Path(whole).absolute())
            raise StageError(f"{key}: there is no file {place}. Check the spelling and the folder")
        files += [file for file in found if file not in files]
    return files


def is_http(path: str) -> bool:
    """A web page: it can be read but not listed."""
    return path.startswith(("http://", "https://"))


def _is_absolute(path: str) -> bool:
    return store.is_url(path) or path.startswith(("/", "~"))


def below(root: str, file: str) -> str:
    """`file` relative to `root`, in whatever form the file system writes either."""
    whole, starts = _one_form(file), (_one_form(root), str(Path(root).absolute()))
    for start in (start.rstrip("/") + "/" for start in starts):
        if whole.startswith(start):
            return whole[len(start) :]
    return file.rsplit("/", 1)[-1]


def _one_form(place: str) -> str:
    """memory://a and memory:///a are one place, and so are file:///a and /a."""
    protocol, mark, path = place.partition("://")
    if not mark or protocol in ("file", "local"):
        return path or place
    return f"{protocol}://{path.lstrip('/')}"


def _text(place: str) -> str:
    with store.open_raw(place) as file:
        return file.read().decode("utf-8", errors="replace")
