"""Reads from a linear layer what the kernels multiply by: plain, with LoRA, in 4 bits.

PEFT and bitsandbytes keep their layers; nothing is copied, so that saving, merging and sharding
find every parameter where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from regrow.kernels import nf4
from regrow.kernels.projection import Projection, Rooms
from regrow.tasks.modeling.float8 import Float8Linear
from regrow.tasks.modeling.rounded_weights import RoundedWeights

_LORA_LAYERS = (
    "Linear",
    "Linear4bit",
)  # of PEFT; Linear8bitLt multiplies in int8


def why_not(layer: nn.Module) -> str:
    """Why the kernels cannot take the place of this layer's own forward; "" when they can."""
    if isinstance(layer, LoraLayer):
        return _why_not_lora(layer)
    return _why_not_base(layer)


def _why_not_base(layer: nn.Module) -> str:
    if type(layer) in (nn.Linear, Float8Linear) or _is_4bit(layer):
        return _hooked(layer)
    if type(layer).__name__ == "Linear8bitLt":
        return "int8 layers round their inputs too, which the kernels do not"
    return f"a layer of type {type(layer).__name__}"


def _why_not_lora(layer: Any) -> str:
    if type(layer).__name__ not in _LORA_LAYERS or len(layer.active_adapters) != 1:
        return f"an adapter of type {type(layer).__name__}"
    (name,) = layer.active_adapters
    if layer.lora_variant.get(name) is not None:
        return f"the kernels have no {type(layer.lora_variant[name]).__name__}"
    if layer.lora_bias.get(name) or getattr(layer, "fan_in_fan_out", False):
        return "the adapter has a bias or a transposed weight"
    return _hooked(layer) or _why_not_base(layer.base_layer)


def _hooked(layer: nn.Module) -> str:
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks)
    return "a hook is on the layer" if any(hooks) else ""


def _is_4bit(layer: nn.Module) -> bool:
    kind = type(layer)
    return kind.__name__ == "Linear4bit" and kind.__module__.startswith("bitsandbytes")


def are_ready(layers: Sequence[nn.Module]) -> bool:
    """Whether all weights are here in full now, and all adapters are on and not merged."""
    return all(_is_ready(layer) for layer in layers)


def _is_ready(layer: Any) -> bool:
    base = layer
    if isinstance(layer, LoraLayer):
        if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
            return False
        (name,) = layer.active_adapters
        if name not in layer.lora_A or isinstance(layer.lora_A[name].weight, DTensor):
            return False
        base = layer.base_layer
    if isinstance(base.weight, DTensor):
        return False
    return not _is_4bit(base) or _quant_state(base) is not None


def projections_of(
    layers: Sequence[nn.Module],
    rounded: RoundedWeights | None,
    dtype: torch.dtype,
    rooms: Rooms | None = None,
) -> list[Projection]:
    """What the kernels multiply an input by.

    Args:
        rounded: keeps weights and adapters in `dtype`, where that is not their own.
        rooms: next to the weights, where `joint_weights` has laid them so.
    """
    if rounded is None or torch.compiler.is_compiling():
        return _looked_up(layers, rounded, dtype, rooms)
    adapters = (
        x for layer in layers if isinstance(layer, LoraLayer) for x in layer.active_adapters
    )
    key = (dtype, *layers, *adapters)
    return rounded.kept(key, lambda: _looked_up(layers, rounded, dtype, rooms))


def _looked_up(
    layers: Sequence[nn.Module],
    rounded: RoundedWeights | None,
    dtype: torch.dtype,
    rooms: Rooms | None,
) -> list[Projection]:
    """As `projections_of`, by asking every layer."""
    group = [projection_of(layer, rounded, dtype) for layer in layers]
    rooms = rooms or Rooms()
    if rounded is not None and not torch.compiler.is_compiling():
        group = _with_low(group, rounded, dtype, rooms.below)
    if rooms.beside:
        group = [replace(p, beside=b) for p, b in zip(group, rooms.beside, strict=True)]
    if rooms.below is None:
        return group
    return [*group[:-1], replace(group[-1], room=rooms.below)]


def _with_low(
    group: list[Projection], rounded: RoundedWeights, dtype: torch.dtype, room: Tensor | None
) -> list[Projection]:
    """Adapters in `dtype` too: all A one under the other, and all B where their ranks are one."""
    adapted = [(p.a, p.b) for p in group if p.a is not None and p.b is not None]
    if len(adapted) != len(group):
        return group
    low_a = rounded.below([a for a, _ in adapted], dtype, room)
    if low_a is None:
        return group
    if len({len(a) for a, _ in adapted}) == 1:
        low_b = rounded.below([b for _, b in adapted], dtype)
    else:
        low_b = [rounded.of(b, dtype) for _, b in adapted]
    if low_b is None or any(b is None for b in low_b):
        return group
    return [
        replace(p, low=(a, b)) for p, a, b in zip(group, low_a, low_b, strict=True) if b is not None
    ]


def projection_of(
    layer: Any, rounded: RoundedWeights | None = None, dtype: torch.dtype = torch.float32
) -> Projection:
    """The layer's weights as they are now; see `are_ready`.

    Args:
        rounded: keeps the weight in `dtype`, where that is not its own.
    """
    if not isinstance(layer, LoraLayer):
        copy = rounded and rounded.of(layer.weight, dtype)
        return Projection(_weight(layer), bias=layer.bias, rounded=copy)
    peft: Any = layer
    (name,) = peft.active_adapters
    return Projection(
        _weight(peft.base_layer),
        peft.lora_A[name].weight,
        peft.lora_B[name].weight,
        float(peft.scaling[name]),
        peft.base_layer.bias,
    )


def _weight(base: Any) -> Any:
    if isinstance(base, Float8Linear):
        return base.in_8_bits()
    return _in_4_bits(base) if _is_4bit(base) else base.weight


def _quant_state(base: Any) -> Any:
    """Scales of a weight in 4 bits; None before they are made. FSDP2 gathers a plain tensor, which
    knows none: the layer does."""
    state = getattr(base.weight, "quant_state", None)
    return state if state is not None else getattr(base, "quant_state", None)


def _in_4_bits(base: Any) -> Callable[[], Tensor]:
    """What makes the dense matrix of a weight in 4 bits, each time it is called."""
    weight, state = base.weight, _quant_state(base)
    if weight.is_cuda and getattr(state, "quant_type", "") == "nf4":
        scales = nf4.Scales.of(state)
        return nf4.Nf4Weight(weight, state.code, scales, tuple(state.shape), state.dtype)
    from bitsandbytes.functional import dequantize_4bit

    return lambda: dequantize_4bit(weight.data, state)


def dropout_of(layers: Sequence[nn.Module]) -> float:
    """The probability of the adapters' dropout now: 0 in evaluation."""
    for layer in layers:
        if isinstance(layer, LoraLayer) and layer.training:
            peft: Any = layer
            (name,) = peft.active_adapters
            return float(getattr(peft.lora_dropout[name], "p", 0.0))
    return 0.0


def same_dropout(layers: Sequence[nn.Module]) -> bool:
    """Whether one probability holds for all of them, as the kernels want it."""
    found = set()
    for layer in layers:
        if isinstance(layer, LoraLayer):
            peft: Any = layer
            found |= {getattr(drop, "p", 0.0) for drop in peft.lora_dropout.values()}
    return len(found) <= 1


def in_compute_dtype(x: Tensor) -> Tensor:
    """x as a linear layer would take it: in autocast's type where that is on."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x
