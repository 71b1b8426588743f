"""The base model's weights, read from its files one at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from safetensors import safe_open
from torch import Tensor


class BaseFiles:
    """All tensors in the safetensors files of a directory."""

    def __init__(self, directory: Path) -> None:
        self._file_of: dict[str, Path] = {}
        for path in _weight_files(directory):
            with safe_open(path, "pt") as file:
                self._file_of |= dict.fromkeys(file.keys(), path)

    @property
    def names(self) -> set[str]:
        """Names of the tensors."""
        return set(self._file_of)

    def read(self, name: str) -> Tensor:
        """One tensor as it is stored."""
        with safe_open(self._file_of[name], "pt") as file:
            return file.get_tensor(name)


def _weight_files(directory: Path) -> list[Path]:
    """Those that the index names; all where there is none."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        names = set(json.loads(index.read_text())["weight_map"].values())
        return [directory / name for name in sorted(names)]
    single = directory / "model.safetensors"
    return [single] if single.is_file() else sorted(directory.glob("*.safetensors"))


def fits(required: Iterable[str], names: set[str]) -> bool:
    """Whether files hold all of a model's weights under the model's own names."""
    return names.issuperset(required)
