"""A saved state as files: tensors in safetensors by torch's distributed checkpoint, the rest beside.

    shard-00001-model-00001-of-00001.safetensors ...   each rank's part of the tensors
    values.pt            plain values of optimizer, scheduler, ...; the same on all ranks
    random-00000.pt ...  the random states of each rank

Nothing here is unpickled freely: the tensors are safetensors, the rest is read by `torch.load` with
`weights_only`, which builds no objects.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from regrow.tasks.train.state import State

_VALUES = "values.pt"


def write_state(
    state: State, directory: Path, random: Mapping[str, Any], rank: int, group: ProcessGroup | None
) -> None:
    """Write this rank's part into a directory of its own; all ranks call it together.

    Args:
        group: of all ranks, on the CPU; None for a single process.
    """
    directory.mkdir(parents=True, exist_ok=True)
    writer = HuggingFaceStorageWriter(str(directory), save_distributed=True)
    save(state.tensors, storage_writer=writer, process_group=group, no_dist=group is None)
    torch.save(dict(random), directory / _random_name(rank))
    if rank == 0:
        torch.save(state.values, directory / _VALUES)
        # What cannot be read again must fail now, not when the checkpoint is needed.
        torch.load(directory / _VALUES, weights_only=True)


def _random_name(rank: int) -> str:
    return f"random-{rank:05d}.pt"


class SavedState:
    """A state's files, of all ranks in one directory."""

    def __init__(self, directory: Path, group: ProcessGroup | None = None) -> None:
        self._directory, self._group = directory, group

    @cached_property
    def values(self) -> Mapping[str, Any]:
        """What was not a tensor."""
        return torch.load(self._directory / _VALUES, weights_only=True, map_location="cpu")

    def random(self, rank: int) -> Mapping[str, Any] | None:
        """The random states of a rank; None when there were fewer ranks."""
        path = self._directory / _random_name(rank)
        return torch.load(path, weights_only=True) if path.exists() else None

    @property
    def ranks(self) -> int:
        """How many processes saved it."""
        return len(list(self._directory.glob("random-*.pt")))

    def shapes(self) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        """{name: (global shape, type)} of all tensors."""
        found: Any = self._reader().read_metadata().state_dict_metadata
        return {name: (tuple(t.size), t.properties.dtype) for name, t in found.items()}

    def load(self, targets: dict[str, Tensor]) -> None:
        """Fill the tensors, of each rank its part; all ranks call it together."""
        load(
            dict(targets),
            storage_reader=self._reader(),
            process_group=self._group,
            no_dist=self._group is None,
        )

    def _reader(self) -> HuggingFaceStorageReader:
        return HuggingFaceStorageReader(str(self._directory))
