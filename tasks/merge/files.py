"""The base model's weights read from its files one at a time, and the merged ones written so."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

_SHARD_BYTES = 4 * 2**30  # so much of the merged model waits in memory; hubs like 5 GB and less


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


class ShardWriter:
    """Writes tensors into `model.safetensors`, or into several such files with an index."""

    def __init__(self, directory: Path, most_bytes: int = _SHARD_BYTES) -> None:
        self._directory, self._most = directory, most_bytes
        self._waiting: dict[str, Tensor] = {}
        self._bytes = self._total = 0
        self._shards: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """One more tensor; what waits is written when it is enough for a file."""
        size = tensor.numel() * tensor.element_size()
        if self._waiting and self._bytes + size > self._most:
            self._write()
        self._waiting[name] = tensor.contiguous()
        self._bytes += size
        self._total += size

    def close(self) -> None:
        """Write what waits, name the files by their number, and write the index."""
        self._write()
        count = len(self._shards)
        if count == 1:
            self._part(0).rename(self._directory / "model.safetensors")
            return
        weight_map = {}
        for number, names in enumerate(self._shards):
            file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            self._part(number).rename(self._directory / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (self._directory / "model.safetensors.index.json").write_text(text)

    def _write(self) -> None:
        save_file(self._waiting, self._part(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(list(self._waiting))
        self._waiting, self._bytes = {}, 0

    def _part(self, number: int) -> Path:
        return self._directory / f"part-{number:05d}.safetensors"


def fits(required: Iterable[str], names: set[str]) -> bool:
    """Whether files hold all of a model's weights under the model's own names."""
    return names.issuperset(required)


def to_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Floating point numbers in `dtype`, others as they are."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
