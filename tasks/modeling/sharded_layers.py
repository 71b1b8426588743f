"""Divided layers that FSDP2 shards over groups of processes (tensor and data parallelism).

Transformers lays the base out so while it loads it, in two dimensions that it names "fsdp" and
"tp". PEFT knows one of them: it takes the sizes of adapters from the part that a process stores,
where layers compute with what FSDP2 puts together of such parts, and leaves them unsharded.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from regrow.tasks.stage import StageError


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 shards any of it already."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def check_shared_weight(model: Any, processes: int) -> None:
    """Raises StageError for a trained weight that is embedding and head, and is cut unevenly.

    FSDP2 fills uneven parts up, in a copy of its own for each module; of two modules that share a
    weight one would go on with the copy as it was at first, without a word (torch 2.13).
    """
    first, last = model.get_input_embeddings(), model.get_output_embeddings()
    if last is None or last.weight is not first.weight:
        return
    rows = len(first.weight)
    if rows % processes:
        raise StageError(
            f"tensor_parallel_size: embedding and head of this model share {rows} rows, which "
            f"{processes} processes cannot divide evenly; train an adapter, or use `fsdp_config` "
            "without tensor_parallel_size"
        )


def keep_gathered(model: nn.Module) -> None:
    """Let weights stay gathered between the forward and the backward pass."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_reshard_after_forward(False, recurse=False)


@torch.no_grad()
def size_adapter(model: nn.Module) -> None:
    """Give adapters the sizes that layers compute with, and no values yet."""
    for layer in model.modules():
        base: Any = layer.get_base_layer() if isinstance(layer, LoraLayer) else None
        if base is None or not isinstance(base.weight, DTensor):
            continue
        held: Any = layer
        outputs, inputs = base.weight.shape
        for name, rank in held.r.items():
            _resize(held.lora_A[name], (rank, inputs))
            _resize(held.lora_B[name], (outputs, rank))


def _resize(linear: nn.Linear, shape: tuple[int, int]) -> None:
    old = linear.weight
    weight: Tensor = torch.zeros(shape, dtype=old.dtype, device=old.device)
    if isinstance(old, DTensor):
        weight = distribute_tensor(weight, old.device_mesh, old.placements, src_data_rank=None)
    linear.weight = nn.Parameter(weight, requires_grad=old.requires_grad)
    linear.out_features, linear.in_features = shape


def shard_adapter(model: Any) -> None:
    """Shard what is trained over the groups over which FSDP2 shards the base, each by itself."""
    base = model.get_base_model()
    meshes = (p.device_mesh for p in base.parameters() if isinstance(p, DTensor))
    mesh = next(mesh["fsdp"] for mesh in meshes if "fsdp" in (mesh.mesh_dim_names or ()))
    for module in list(model.modules()):
        if any(p.requires_grad for p in module.parameters(recurse=False)):
            fully_shard(module, mesh=mesh)
    register_fsdp_forward_method(base, "forward")  # which PEFT calls, where FSDP2 hears a call only
