"""Float32 weights rounded to the type they are multiplied in, once for each optimizer step.

Trained weights are float32; the tensor cores want 16 bits. Rounding a weight in the forward pass,
in the backward pass and in a recomputed one reads and writes 6 bytes of each element every time:
1.2e9 weights are 2.5 ms a time on an H100, of a step of 230 ms. Of adapters it is the launches that
count: 14 small matrices a layer, and their neighbours put together. All copies are made at once.
Whoever steps the optimizer calls `expire`, as some optimizers change weights where PyTorch's
counter of versions does not see it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Kept = TypeVar("Kept")


class RoundedWeights:
    """Copies of parameters, made when one is first asked for after each `expire`."""

    def __init__(self) -> None:
        self._weights: dict[int, Tensor] = {}
        self._copies: dict[int, Tensor] = {}
        self._places: dict[int, Tensor] = {}
        self._fresh: set[int] = set()
        self._written: set[int] = set()
        self._kept: dict[Hashable, Any] = {}

    def kept(self, key: Hashable, make: Callable[[], Kept]) -> Kept:
        """What `make` made of weights and copies when it was first asked for since `expire`.

        Looking up what PEFT's layers hold is a tenth of the host's time for a layer, and a layer
        that is computed again asks twice.
        """
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def of(self, weight: Tensor, dtype: torch.dtype) -> Tensor | None:
        """The weight in `dtype`; None where it has that type itself. It takes no gradient."""
        if weight.dtype != torch.float32 or dtype == torch.float32:
            return None
        key = id(weight)
        copy = self._copies.get(key)
        if copy is None or copy.dtype != dtype or copy.device != weight.device:
            copy = torch.empty_like(weight, dtype=dtype, requires_grad=False)
            self._take(weight, copy)
        if key not in self._fresh:
            self._refresh(weight.device)
        return copy

    def below(
        self, weights: Sequence[Tensor], dtype: torch.dtype, room: Tensor | None = None
    ) -> list[Tensor] | None:
        """The weights [O, I] in `dtype`, one under the other in memory; None where one has that
        type itself.

        Args:
            room: where to lay them, if they fit.
        """
        if dtype == torch.float32 or any(w.dtype != torch.float32 for w in weights):
            return None
        first = weights[0]
        sizes = [len(weight) for weight in weights]
        place = self._places.get(id(first))
        if place is None or (place.dtype, place.device) != (dtype, first.device):
            like: dict[str, Any] = {"dtype": dtype, "device": first.device}
            shape = sum(sizes), *first.shape[1:]
            if room is None or not _fits(room, shape, **like):
                room = torch.empty(shape, **like)
            place = self._places[id(first)] = room[: shape[0]]
            for weight, part in zip(weights, place.split(sizes), strict=True):
                self._take(weight, part)
        found = [self.of(weight, dtype) for weight in weights]
        return [copy for copy in found if copy is not None]

    def _take(self, weight: Tensor, copy: Tensor) -> None:
        """From now on this is the weight's copy; it is not written yet."""
        key = id(weight)
        self._weights[key], self._copies[key] = weight, copy
        self._fresh.discard(key)

    def _refresh(self, device: torch.device) -> None:
        """Write every copy on the device that is older than its weight."""
        stale = [
            key
            for key, weight in self._weights.items()
            if key not in self._fresh and weight.device == self._copies[key].device == device
        ]
        with torch.no_grad():
            at_once: Any = torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage]
            at_once([self._copies[key] for key in stale], [self._weights[key] for key in stale])
        self._fresh.update(stale)

    def expire(self) -> None:
        """The weights have changed; copies that were written along with them are fresh, once."""
        self._fresh, self._written = self._written, set()
        self._kept.clear()

    def to_write(self, weight: Tensor) -> Tensor | None:
        """The copy, where there is one: whoever changes the weight now writes it as well."""
        copy = self._copies.get(id(weight))
        if copy is not None:
            self._written.add(id(weight))
        return copy

    def __deepcopy__(self, memo: object) -> RoundedWeights:
        return RoundedWeights()  # another model's weights are other tensors


def _fits(room: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a matrix of that shape and kind may lie at the beginning of the room."""
    alike = (room.dtype, room.device, room.shape[1:]) == (dtype, device, torch.Size(shape[1:]))
    return alike and len(room) >= shape[0]


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
