"""Linear layers that multiply in 8-bit floats: trained ones by torchao, frozen ones by ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from regrow.kernels.float8 import Float8Weight
from regrow.kernels.lora_linear import lora_linear
from regrow.kernels.projection import Projection
from regrow.tasks.modeling.quantization import require_package
from regrow.tasks.stage import StageError

_MULTIPLE = 16
"""cuBLAS multiplies 8-bit floats in sizes that are a multiple of it (torchao's documentation)."""
_CAPABILITY = (8, 9)
"""Of NVIDIA's first devices with 8-bit floats (Ada; Hopper is 9.0)."""


def multiply_in_float8(model: nn.Module, device: str) -> int:
    """Swap the linear layers inside the model; how many there are.

    Each product's three factors (inputs, weights, gradients) are rounded to 8 bits, with a scale
    for each tensor, found anew each time; sums, weights and the optimizer stay as they are. The
    output head and layers of odd sizes multiply as before. On a CPU the products are emulated.

    Raises:
        StageError: torchao is missing, the device has no 8-bit floats, or no layer can be swapped.
    """
    require_package("torchao", "torchao", "fp8")
    from torchao.float8 import (  # pyright: ignore[reportMissingImports]
        Float8LinearConfig,
        convert_to_float8_training,
    )

    _check_device(device)
    head = getattr(model, "get_output_embeddings", lambda: None)()

    def fits(module: nn.Module, name: str) -> bool:
        if not isinstance(module, nn.Linear) or module is head:
            return False
        return not (module.in_features % _MULTIPLE or module.out_features % _MULTIPLE)

    count = sum(fits(module, name) for name, module in model.named_modules())
    if not count:
        raise StageError("fp8: the model has no linear layers that it is for; set fp8: false")
    config = Float8LinearConfig(emulate=not _on_cuda(device))
    convert_to_float8_training(model, module_filter_fn=fits, config=config)
    return count


def _on_cuda(device: str) -> bool:
    return device != "cpu" and torch.cuda.is_available()


def _check_device(device: str) -> None:
    if _on_cuda(device) and torch.cuda.get_device_capability() < _CAPABILITY:
        raise StageError(
            f"fp8: {torch.cuda.get_device_name()} does not multiply 8-bit floats (NVIDIA's Ada, "
            "Hopper and later do); set fp8: false"
        )


class _Rounded:
    """Weights that are rounded to 8 bits as one, when they are first asked for.

    It knows no layer: one that it belonged to would be a cycle, which holds all of them on the
    device until Python looks for garbage.
    """

    def __init__(self, weights: Sequence[Tensor], merged: Sequence[list[str]]) -> None:
        self.weights, self._merged = list(weights), list(merged)
        self._made: list[Float8Weight] = []
        self._state: list[tuple[Any, ...]] = []

    def part(self, number: int) -> Float8Weight:
        """One of them; all are made again when one has moved or changed since."""
        now = [
            (weight.device, weight.data_ptr(), weight._version, *merged)
            for weight, merged in zip(self.weights, self._merged, strict=True)
        ]
        if now != self._state:
            self._made = Float8Weight.of_group([weight.detach() for weight in self.weights])
            self._state = now
        return self._made[number]


class Float8Linear(nn.Module):
    """A frozen linear layer that multiplies in 8 bits, both directions; its weight stays.

    The 8-bit weights (one for each direction, together as large as the weight in 16 bits) are made
    when they are first asked for, and again when the weight has moved or changed since. Of changes
    behind PyTorch's back (`weight.data += ...`) only PEFT's merges are noticed.
    """

    def __init__(self, linear: nn.Linear, merged: list[str] | None = None) -> None:
        """`merged`: PEFT's own list of the adapters that the weight holds now."""
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self._merged = [] if merged is None else merged
        self._rounded, self._number = _Rounded([self.weight], [self._merged]), 0

    def in_8_bits(self) -> Float8Weight:
        """The weight, rounded row by row and column by column."""
        if self._rounded.weights[self._number] is not self.weight:  # another parameter
            round_together([self])
        return self._rounded.part(self._number)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] -> [..., O]."""
        return lora_linear(x, Projection(self.in_8_bits(), bias=self.bias))[0]

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}"


def round_together(linears: Sequence[Float8Linear]) -> None:
    """Layers of one input: their weights are rounded as one, and can be multiplied as one."""
    rounded = _Rounded([each.weight for each in linears], [each._merged for each in linears])
    for number, linear in enumerate(linears):
        linear._rounded, linear._number = rounded, number


def freeze_in_float8(model: nn.Module, device: str) -> int:
    """Swap the frozen linear layers under LoRA adapters, all but the head; how many there are.

    Raises:
        StageError: the device has no 8-bit floats, or there is no such layer.
    """
    _check_device(device)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    found: list[tuple[Any, nn.Linear]] = []
    for module in model.modules():
        is_inside = isinstance(module, LoraLayer) and module is not head
        base = module.base_layer if is_inside else None
        if type(base) is nn.Linear and not any(size % _MULTIPLE for size in base.weight.shape):
            found.append((module, base))
    for layer, base in found:
        layer.base_layer = Float8Linear(base, layer.merged_adapters)
    if not found:
        raise StageError("fp8: the model has no linear layers that it is for; set fp8: false")
    return len(found)
