"""Writes a model's files: safetensors of bounded size, their index, and the configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

SHARD_BYTES = 4 * 2**30
"""The size of a file, which waits in memory before it is written; hubs like 5 GB and less."""


class ShardWriter:
    """Writes tensors into `model.safetensors`, or into several such files with an index."""

    def __init__(self, directory: Path, most_bytes: int = SHARD_BYTES) -> None:
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


def write_config(model: Any, dtype: str, out: Path) -> None:
    """The configurations, as `save_pretrained` leaves them beside weights in `dtype`."""
    model.config.dtype = dtype
    # FSDP2 makes a class of its own of the model's.
    model.config.architectures = [type(model).__name__.removeprefix("FSDP")]
    model.config.save_pretrained(str(out))
    if model.generation_config is not None:
        model.generation_config.save_pretrained(str(out))
