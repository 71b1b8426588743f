"""A saved state as files: tensors as safetensors by torch's distributed checkpoint, and the rest.

    shard-00001-model-00001-of-00001.safetensors ...   each rank's part of the tensors
    values.pt            plain values of optimizer, scheduler, ...; the same on all ranks
    random-00000.pt ...  the random states of each rank

Nothing here is unpickled freely: the tensors are safetensors, the rest is read by `torch.load` with
`weights_only`, which builds no objects.
"""

from __future__ import annotations

import json
import struct
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
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from regrow.tasks.train.state import State

_VALUES = "values.pt"

# Names of types in safetensors' format.
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_state(
    state: State, directory: Path, random: Mapping[str, Any], rank: int, group: ProcessGroup | None
) -> None:
    """Write this rank's part into a directory of its own; all ranks call it together.

    Args:
        group: of all ranks, on the CPU; None for a single process.
    """
    directory.mkdir(parents=True, exist_ok=True)
    writer = _FileWriter(str(directory), save_distributed=True)
    save(state.tensors, storage_writer=writer, process_group=group, no_dist=group is None)
    torch.save(dict(random), directory / _random_name(rank))
    if rank == 0:
        torch.save(state.values, directory / _VALUES)
        # What cannot be read again must fail now, not when the checkpoint is needed.
        torch.load(directory / _VALUES, weights_only=True)


class _FileWriter(HuggingFaceStorageWriter):
    """Torch's writer, but tensor by tensor.

    Torch's own makes one bytes object of all tensors first, holding the interpreter's lock: the
    loop stood still for 18 s while 17 GB a rank were saved (H200 x2, torch 2.11).
    """

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """One file in safetensors' format, with what torch's reader needs in its header."""
        done: Future[list[WriteResult]] = Future()
        done.set_result([])  # torch's `finish` makes nothing of it when every rank saves its own
        if not plan.items:
            return done
        tensors: dict[str, Tensor] = {}
        offsets: dict[str, dict[str, list[int]]] = {}
        for item in plan.items:
            tensor: Any = planner.resolve_data(item)
            place: Any = item.tensor_data
            tensors[item.index.fqn] = tensor.detach().contiguous()
            offsets[item.index.fqn] = {"saved_offsets": list(place.chunk.offsets)}
        number = plan.storage_data["shard_index"]
        path = Path(str(self.path)) / f"shard-{number:05d}-model-00001-of-00001.safetensors"
        _write_safetensors(path, tensors, {"DCP_SHARDING_INFO": json.dumps(offsets)})
        return done


def _write_safetensors(path: Path, tensors: Mapping[str, Tensor], notes: dict[str, str]) -> None:
    """The format: length of the header (8 bytes), header (JSON), the tensors' bytes."""
    header: dict[str, Any] = {"__metadata__": notes}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        kind = _DTYPES[tensor.dtype]
        header[name] = {
            "dtype": kind,
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            # Writing from memory as it lies lets other threads run meanwhile.
            data: Any = tensor.flatten().view(torch.uint8).numpy()
            file.write(data)


def _random_name(rank: int) -> str:
    return f"random-{rank:05d}.pt"


class SavedState:
    """A state's files, of all ranks in one directory."""

    def __init__(self, directory: Path, group: ProcessGroup | None = None) -> None:
        self._directory, self._group = directory, group

    @property
    def values(self) -> Mapping[str, Any]:
        """What was not a tensor."""
        return self._values

    @cached_property
    def _values(self) -> Mapping[str, Any]:
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
