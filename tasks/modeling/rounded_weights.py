"""Float32 weights rounded to the type they are multiplied in, once for each optimizer step.

Trained weights are float32; the tensor cores want 16 bits. Rounding a weight in the forward pass,
in the backward pass and in a recomputed one reads and writes 6 bytes of each element every time:
1.2e9 weights are 2.5 ms a time on an H100, of a step of 230 ms. Whoever steps the optimizer calls
`expire`, as some optimizers change weights where PyTorch's counter of versions does not see it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class RoundedWeights:
    """Copies of parameters, made when first asked for after each `expire`."""

    def __init__(self) -> None:
        self._copies: dict[int, Tensor] = {}
        self._fresh: set[int] = set()
        self._written: set[int] = set()

    def of(self, weight: Tensor, dtype: torch.dtype) -> Tensor | None:
        """The weight in `dtype`; None where it has that type itself. It takes no gradient."""
        if weight.dtype != torch.float32 or dtype == torch.float32:
            return None
        key = id(weight)
        copy = self._copies.get(key)
        if copy is None or copy.dtype != dtype or copy.device != weight.device:
            copy = self._copies[key] = torch.empty_like(weight, dtype=dtype, requires_grad=False)
            self._fresh.discard(key)
        if key not in self._fresh:
            with torch.no_grad():
                copy.copy_(weight)
            self._fresh.add(key)
        return copy

    def expire(self) -> None:
        """The weights have changed; copies that were written along with them are fresh, once."""
        self._fresh, self._written = self._written, set()

    def to_write(self, weight: Tensor) -> Tensor | None:
        """The copy, where there is one: whoever changes the weight now writes it as well."""
        copy = self._copies.get(id(weight))
        if copy is not None:
            self._written.add(id(weight))
        return copy

    def __deepcopy__(self, memo: object) -> RoundedWeights:
        return RoundedWeights()  # another model's weights are other tensors


def keep_rounded(model: nn.Module) -> RoundedWeights:
    """Lets all layers of the model that can (attribute `rounded`) share one set of copies.

    Only where parameters stay the tensors they are: not under FSDP or DeepSpeed's ZeRO-3.
    """
    shared = RoundedWeights()
    for module in model.modules():
        if "rounded" in vars(module):
            holder: Any = module
            holder.rounded = shared
    return shared
