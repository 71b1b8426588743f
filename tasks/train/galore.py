"""GaLore's AdamW with states in 8 bits, on CPUs too (arXiv 2403.03507).

The class in galore_torch 1.0 waits for CUDA after every step, and passes its arguments in the order
of an older bitsandbytes: what 0.50 takes for a bound on steps was a percentile.
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.optim.adamw import AdamW8bit
from galore_torch.galore_projector import (  # pyright: ignore[reportMissingImports]
    GaLoreProjector,
)

_PROJECTION = ("rank", "update_proj_gap", "scale", "proj_type")


class GaLoreAdamW8bit(AdamW8bit):
    """bitsandbytes' AdamW, in groups that have a "rank" on gradients projected to it."""

    @torch.no_grad()
    def init_state(self, group: Any, p: Any, gindex: int, pindex: int) -> None:
        """Of a projected parameter the projector only: the rest has the shape of its output."""
        if "rank" not in group:
            super().init_state(group, p, gindex, pindex)
            return
        settings = {name: group[name] for name in _PROJECTION}
        self.state[p]["projector"] = GaLoreProjector(**settings)

    @torch.no_grad()
    def update_step(self, group: Any, p: Any, gindex: int, pindex: int) -> None:
        """A projected parameter's step is taken from zero in the small space and brought back."""
        if "rank" not in group:
            super().update_step(group, p, gindex, pindex)
            return
        state, weights = self.state[p], p.data
        projector = state["projector"]
        gradient = projector.project(p.grad, state.get("step", 0))
        p.grad = None  # of another shape than what comes now
        p.data = torch.zeros_like(gradient)
        p.grad = gradient
        undecayed = {**group, "weight_decay": 0.0}
        if "state1" not in state:
            super().init_state(undecayed, p, gindex, pindex)
        super().update_step(undecayed, p, gindex, pindex)
        step, p.grad = p.data, None
        p.data = weights.add_(projector.project_back(step))
        weights.mul_(1 - group["lr"] * group["weight_decay"])
