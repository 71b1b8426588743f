"""AdamW for full fine-tuning whose one pass clips, steps and rounds (`regrow.kernels.adamw`).

Its states have PyTorch's names and shapes, so that a checkpoint of one is read by the other.

It takes each gradient over the moment it is summed up: the Trainer's clipping, which would read and
write every gradient in a pass of its own even where there is nothing to clip, then finds none.
So it is for one process: with several, gradients are still to be averaged at that moment (see
`regrow.tasks.train.shard_adamw`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW

from regrow.kernels.adamw import AdamWSettings, adamw_step, clipping
from regrow.tasks.modeling.rounded_weights import RoundedWeights

NAMES = ("adamw_torch", "adamw_torch_fused")
"""Optimizers of recipes that it computes."""


class FusedAdamW(AdamW):
    """PyTorch's AdamW of float32 weights, with the clipping in it."""

    def __init__(
        self, params: Any, *, max_grad_norm: float, rounded: RoundedWeights | None, **settings: Any
    ) -> None:
        """`max_grad_norm`: 0 for none; `rounded`: whose copies follow the weights, if there are."""
        super().__init__(params, foreach=False, fused=False, **settings)
        self._most, self._rounded = max_grad_norm, rounded
        self._gradients: dict[Tensor, Tensor] = {}
        self.norm: Tensor | None = None
        """Of all gradients of the last step before clipping, on the device."""
        self._listen()

    def _listen(self) -> None:
        """Take each gradient over the moment it is summed up."""
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.register_post_accumulate_grad_hook(self._take)

    def _take(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        if parameter in self._gradients:
            self._gradients[parameter] += parameter.grad
        else:
            self._gradients[parameter] = parameter.grad
        parameter.grad = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Move all weights that have a gradient; forget the gradients."""
        assert closure is None, "the gradients are computed before"
        gradients, self._gradients = self._gradients, {}
        if not gradients:
            return
        self.norm, factor = self._clipping(list(gradients.values()))
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter in gradients:
                    self._move(parameter, gradients.pop(parameter), factor, group)
                    self._after(parameter)

    def _after(self, parameter: Tensor) -> None:
        """A parameter has moved, before the next one does."""

    def _clipping(self, gradients: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """(norm of all together, what they are multiplied by)."""
        return clipping(gradients, self._most)

    def _move(
        self, parameter: Tensor, gradient: Tensor, factor: Tensor, group: Mapping[str, Any]
    ) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)  # on the host, where its value is needed
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        settings = AdamWSettings(
            float(group["lr"]),
            float(beta1),
            float(beta2),
            group["eps"],
            group["weight_decay"],
            int(state["step"].item()),
        )
        low = self._rounded.to_write(parameter) if self._rounded else None
        moved = (parameter, gradient, state["exp_avg"], state["exp_avg_sq"])
        p, g, m, v = (self._here(tensor) for tensor in moved)
        adamw_step(p, g, m, v, factor, settings, low)

    def _here(self, tensor: Tensor) -> Tensor:
        """The numbers of a parameter, its gradient or its states that this process holds."""
        return tensor

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As AdamW's; the steps of one that was computed on the device come to the host."""
        super().__setstate__(state)
        for values in self.state.values():
            if torch.is_tensor(values.get("step")):
                values["step"] = values["step"].float().cpu()
