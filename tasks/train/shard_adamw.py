"""AdamW in one pass on the part of each parameter that FSDP2 leaves this process.

PyTorch's, with the Trainer's clipping before it, reads and writes every gradient once more, and
goes through `DTensor`'s dispatch for each operation. Here the parts are plain tensors, and the
processes exchange one number: the sum of the squares of their gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from regrow.kernels.adamw import clipping_factor, norms
from regrow.tasks.train.trainers.fused_adamw import FusedAdamW


class ShardAdamW(FusedAdamW):
    """`FusedAdamW` for parameters that FSDP2 divides; its states are `DTensor`s as they are.

    Gradients are complete when the backward pass of a step's last micro-batch has ended: `take`
    them then, so that the Trainer's clipping finds none.
    """

    def __init__(
        self,
        params: Any,
        *,
        after: Callable[[Tensor], None] = lambda parameter: None,
        **settings: Any,
    ) -> None:
        """`after`: called with each parameter that has moved, before the next one does."""
        super().__init__(params, **settings)
        self._then = after

    def _after(self, parameter: Tensor) -> None:
        self._then(parameter)

    def take(self) -> None:
        """Take over all gradients of a step."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._gradients[parameter] = parameter.grad
                    parameter.grad = None

    def _listen(self) -> None:
        """Not at single parameters: FSDP2 sums their gradients up while others are computed."""

    def _clipping(self, gradients: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        by_group: dict[ProcessGroup | None, list[Tensor]] = {}
        for gradient in gradients:
            by_group.setdefault(_sharers(gradient), []).append(self._here(gradient))
        squares = []
        for group, parts in by_group.items():
            each = norms([part for part in parts if part.numel()] or parts)
            squares.append(each.square().sum())
            if group is not None:
                torch.distributed.all_reduce(squares[-1], group=group)
        norm = torch.stack(squares).sum().sqrt()
        return norm, clipping_factor(norm, self._most)

    def _here(self, tensor: Tensor) -> Tensor:
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _sharers(tensor: Tensor) -> ProcessGroup | None:
    """The processes that hold the other parts; None where this one holds all."""
    if not isinstance(tensor, DTensor):
        return None
    dims = [number for number, place in enumerate(tensor.placements) if place.is_shard()]
    assert len(dims) <= 1, tensor.placements
    return cast(ProcessGroup, tensor.device_mesh.get_group(dims[0])) if dims else None
