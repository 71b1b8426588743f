"""bitsandbytes' states of shards in checkpoints: as parts of one state, for any number of shards.

`state1`, `state2`: numbers, or codes of 8 bits, for the elements of a parameter (AdEMAMix has two
rows of the first). `absmax1`, `absmax2`: a scale for each 256 codes of a shard; those of all shards
one after the other, each filled up to the same number. `qmap1`, `qmap2`: what the codes stand for.

Where the shards are as many as before, a state comes back to the bit. Where they are not, the
blocks lie elsewhere: the codes are read as numbers and quantized anew, once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

BLOCK = 256
"""Elements with one scale (`Optimizer2State.init_state`, bitsandbytes 0.50.2)."""

SHARDS = "shards"
"""Name of the number of shards among a parameter's states in a checkpoint; absent: 1."""


class _Layout:
    """How `shards` processes divide the first dimension of a parameter, as `torch.chunk` does."""

    def __init__(self, shape: torch.Size, shards: int) -> None:
        width = math.prod(shape[1:])
        self.shards, self._size = shards, math.prod(shape)
        self._step = -(-shape[0] // shards) * width if shape else 1
        self.blocks = -(-self._step // BLOCK)
        """Scales of the largest shard."""

    def range(self, shard: int) -> tuple[int, int]:
        """First and last elements of a shard, counted through the whole parameter."""
        return min(self._step * shard, self._size), min(self._step * (shard + 1), self._size)

    def scales(self, absmax: Tensor, start: int, end: int) -> Tensor:
        """The scale of each element from `start` to `end`; `absmax`: [..., shards * blocks]."""
        parts = absmax.unflatten(-1, (self.shards, self.blocks))
        found = [absmax[..., :0]]
        for shard in range(self.shards):
            low, high = self.range(shard)
            here = slice(max(start, low) - low, min(end, high) - low)
            if max(start, low) < min(end, high):
                found.append(parts[..., shard, :].repeat_interleave(BLOCK, -1)[..., here])
        return torch.cat(found, -1)


def shards_of(parameter: Tensor) -> tuple[int, int]:
    """(number of processes that divide a parameter, the number of this one among them)."""
    if not isinstance(parameter, DTensor):
        return 1, 0
    (dim,) = (n for n, p in enumerate(parameter.placements) if p.is_shard())
    assert parameter.placements[dim].is_shard(0), parameter.placements
    return parameter.device_mesh.size(dim), parameter.device_mesh.get_local_rank(dim)


def is_of_shard(value: Any, parameter: Tensor) -> bool:
    """Whether a state is a plain tensor beside a parameter that is divided."""
    return isinstance(parameter, DTensor) and not isinstance(value, DTensor) and value.dim() > 0


def as_part(field: str, value: Tensor, parameter: DTensor) -> Tensor:
    """A state of this process's shard as its part of one tensor of all shards."""
    if field.startswith("state"):
        lead = value.dim() - parameter.dim()
        return _part(value, (*value.shape[:lead], *parameter.shape), lead, parameter)
    if field.startswith("absmax"):
        shards, _ = shards_of(parameter)
        blocks = _Layout(parameter.shape, shards).blocks
        full = torch.nn.functional.pad(value, (0, blocks - value.shape[-1]))
        return _part(full, (*value.shape[:-1], shards * blocks), value.dim() - 1, parameter)
    assert field.startswith("qmap"), f"a shard's state {field} of shape {tuple(value.shape)}"
    return value


def _part(value: Tensor, shape: tuple[int, ...], dim: int, parameter: DTensor) -> DTensor:
    """`value` as this process's part of a tensor that is divided at `dim` as a parameter is."""
    mesh = parameter.device_mesh
    places = [Shard(dim) if place.is_shard() else place for place in parameter.placements]
    size, stride = torch.Size(shape), torch.empty(shape, device="meta").stride()
    same = value.device.type == mesh.device_type
    local = value if same else value.to("meta")
    part = DTensor.from_local(local, mesh, places, run_check=False, shape=size, stride=stride)
    if not same:
        # `from_local` would move what stands in the host's memory (offloaded or paged) to the GPU.
        part = cast(DTensor, torch.empty_like(part, device=value.device))
        part.to_local().copy_(value)
    return part


def empty_like_saved(
    field: str,
    parameter: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    on_host: bool = False,
) -> Tensor | None:
    """Where one of these states is read to, at the parameter or in the host's memory; None: it is
    none of these."""
    if field.startswith(("absmax", "qmap")):
        return torch.empty(shape, dtype=dtype)
    if not field.startswith("state") or not isinstance(parameter, DTensor):
        return None
    lead = shape[: len(shape) - parameter.dim()]
    local = parameter.to_local()
    device = torch.device("cpu") if on_host else local.device
    empty = torch.empty((*lead, *local.shape), dtype=dtype, device=device)
    return _part(empty, shape, len(lead), parameter)


def of_this_shard(fields: Mapping[str, Any], parameter: Tensor) -> dict[str, Any]:
    """The saved states of a parameter, as an optimizer of bitsandbytes holds them here."""
    before = fields.get(SHARDS, 1)
    found = {name: value for name, value in fields.items() if name != SHARDS}
    if "state1" not in found:
        return found
    for name, value in found.items():
        if isinstance(value, DTensor):
            found[name] = value.to_local()
    shards, shard = shards_of(parameter)
    old, new = _Layout(parameter.shape, before), _Layout(parameter.shape, shards)
    start, end = new.range(shard)
    for number in ("1", "2"):
        scales = found.get(f"absmax{number}")
        if scales is None:
            continue
        if before == shards:
            own = scales.unflatten(-1, (shards, new.blocks))[..., shard, :]
            found[f"absmax{number}"] = own[..., : -(-(end - start) // BLOCK)].contiguous()
        else:
            codes, table = found[f"state{number}"], found[f"qmap{number}"]
            scale = old.scales(scales, start, end)
            found |= _quantized_anew(number, codes, table, scale)
    return found


def _quantized_anew(number: str, codes: Tensor, table: Tensor, scales: Tensor) -> dict[str, Tensor]:
    """Codes and scales in new blocks; `scales`: [..., elements], one for each code."""
    from bitsandbytes.functional import quantize_blockwise

    placed = table.to(codes.device)
    flat = codes.reshape(scales.shape)
    values = placed[flat.int()] * scales.to(codes.device)
    if not values.numel():
        empty = values.new_empty((*values.shape[:-1], 0))
        return {f"state{number}": codes, f"absmax{number}": empty}
    rows = [quantize_blockwise(v, placed, blocksize=BLOCK) for v in values.view(-1, flat.shape[-1])]
    made = torch.stack([row for row, _ in rows]).view_as(codes)
    absmax = torch.stack([state.absmax for _, state in rows]).view(*flat.shape[:-1], -1)
    return {f"state{number}": made, f"absmax{number}": absmax}
