"""Lays the frozen weights of layers with one input one under the other, for one product of them.

Where q, k and v, or gate and up, are rows of one matrix in memory, the gradient of their input is
one product (`regrow.kernels.neighbours`), and room for the adapters' A behind them takes dh A in.
Room for their B beside them makes one product of base and update (`regrow.kernels.joint_product`).
Every parameter stays the object it was, with the same name, shape and numbers; only its place in
memory is another. What is written to its place later (a merged adapter) stays there; a layer whose
weight moves away computes as before, by itself.

Not for weights that FSDP or DeepSpeed divide: they have places of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from regrow.kernels.joint_product import COLUMNS, Beside
from regrow.kernels.projection import Rooms
from regrow.tasks.modeling.float8 import Float8Linear, round_together
from regrow.tasks.modeling.fused import BELOW


def lay_together(model: nn.Module) -> int:
    """Move the weights of all groups of the fused layers on a GPU; how many groups there are.

    One group is copied after the other: the room of its weights is needed once more meanwhile.
    """
    count = 0
    for module in list(model.modules()):
        groups: Any = getattr(module, "weights_to_lay", None)
        found: Any = groups() if callable(groups) else {}
        for name, layers in found.items():
            rooms = lay_group(layers, beside=name != BELOW) if _is_on_gpu(layers) else None
            if rooms is not None:
                its: Any = module
                its.rooms[name] = rooms
                count += 1
    if count and torch.cuda.is_available():
        torch.cuda.empty_cache()  # pieces that are too small for a group
    return count


def lay_group(layers: Sequence[nn.Module], beside: bool = False) -> Rooms | None:
    """The same for layers of one input: the room next to their weights, if it was done.

    Args:
        beside: with room beside them too, for their B.
    """
    bases: list[Any] = [x.base_layer if isinstance(x, LoraLayer) else x for x in layers]
    kinds = {type(base) for base in bases}
    if not kinds <= {nn.Linear, Float8Linear} or len(kinds) != 1:
        return None  # a weight in 4 bits is made dense beside the others each time
    weights: list[Any] = [base.weight for base in bases]
    columns = _columns(layers, weights[0].dtype) if beside and kinds == {nn.Linear} else 0
    if (len(weights) < 2 and not columns) or not _fit(weights):
        return None
    if kinds == {Float8Linear}:
        round_together(bases)
        return Rooms(weights[0].new_empty(0, weights[0].shape[1]))
    ranks = [_rank(layer) for layer in layers]
    below = sum(ranks) if len(layers) > 1 else 0
    sizes, inputs = [*(len(weight) for weight in weights), below], weights[0].shape[1]
    joint = weights[0].new_zeros(sum(sizes), inputs + columns)
    *parts, room = joint[:, :inputs].split(sizes)
    for weight, part in zip(weights, parts, strict=True):
        part.copy_(weight.detach())
        weight.data = part
    starts = [sum(ranks[:i]) for i in range(len(ranks))]
    found = zip(joint[:, inputs:].split(sizes), starts, ranks, strict=False)  # none for the A
    return Rooms(room, tuple(Beside(*each) for each in found) if columns else ())


def _columns(layers: Sequence[Any], dtype: torch.dtype) -> int:
    """Beside the weights; none where they are no adapters for them, or of several ranks each."""
    if dtype not in (torch.bfloat16, torch.float16):
        return 0
    if not all(isinstance(layer, LoraLayer) for layer in layers):
        return 0
    ranks = [{len(a.weight) for a in layer.lora_A.values()} for layer in layers]
    if any(len(of_one) != 1 for of_one in ranks):
        return 0
    return COLUMNS if sum(sum(of_one) for of_one in ranks) <= COLUMNS else 0


def _rank(layer: Any) -> int:
    """The largest of its adapters, of which one is on."""
    adapters: Any = layer.lora_A.values() if isinstance(layer, LoraLayer) else ()
    return max((len(a.weight) for a in adapters), default=0)


def _is_on_gpu(layers: Sequence[nn.Module]) -> bool:
    return all(p.is_cuda for layer in layers for p in layer.parameters())


def _fit(weights: Sequence[Tensor]) -> bool:
    """Whether they are frozen, whole, and of one type and number of inputs."""
    first = weights[0]
    return all(
        not w.requires_grad
        and not isinstance(w, DTensor)
        and w.dtype == first.dtype
        and w.shape[1:] == first.shape[1:]
        for w in weights
    )
