"""Lays the frozen weights of layers with one input one under the other, for one product of them.

Where q, k and v, or gate and up, are rows of one matrix in memory, the gradient of their input is
one product (`regrow.kernels.neighbours`), and room for the adapters' A behind them takes dh A in.
Every parameter stays the object it was, with the same name, shape and numbers; only its place in
memory is another. What is written to its place later (a merged adapter) stays there; a layer whose
weight moves away computes as before, by itself.

Not for weights that FSDP or DeepSpeed divide: they have places of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from regrow.tasks.modeling.float8 import Float8Linear, round_together


def lay_together(model: nn.Module) -> int:
    """Move the weights of all groups of the fused layers on a GPU; how many groups there are.

    One group is copied after the other: the room of its weights is needed once more meanwhile.
    """
    count = 0
    for module, layers in list(_groups(model)):
        room = lay_group(layers) if _is_on_gpu(layers) else None
        if room is not None:
            module.room = room
            count += 1
    if count and torch.cuda.is_available():
        torch.cuda.empty_cache()  # pieces that are too small for a group
    return count


def lay_group(layers: Sequence[nn.Module]) -> Tensor | None:
    """The same for layers of one input: the room [R, I] behind the weights, if it was done."""
    bases: list[Any] = [x.base_layer if isinstance(x, LoraLayer) else x for x in layers]
    kinds = {type(base) for base in bases}
    if not kinds <= {nn.Linear, Float8Linear} or len(kinds) != 1:
        return None  # a weight in 4 bits is made dense beside the others each time
    weights: list[Any] = [base.weight for base in bases]
    if len(weights) < 2 or not _fit(weights):
        return None
    ranks = sum(_rank(layer) for layer in layers)
    room = weights[0].new_empty(0 if kinds == {Float8Linear} else ranks, weights[0].shape[1])
    if kinds == {Float8Linear}:
        round_together(bases)
        return room
    joint = torch.cat([*(weight.detach() for weight in weights), room])
    sizes = [*(len(weight) for weight in weights), ranks]
    *parts, room = joint.split(sizes)
    for weight, part in zip(weights, parts, strict=True):
        weight.data = part
    return room


def _rank(layer: Any) -> int:
    """The largest of its adapters, of which one is on."""
    adapters: Any = layer.lora_A.values() if isinstance(layer, LoraLayer) else ()
    return max((len(a.weight) for a in adapters), default=0)


def _groups(model: nn.Module) -> Iterator[tuple[Any, Sequence[nn.Module]]]:
    for module in model.modules():
        together: Any = getattr(module, "layers_of_one_input", None)
        if callable(together):
            layers: Any = together()
            yield module, layers


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
