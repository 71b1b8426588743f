"""A layer of experts that computes with our kernels, with PEFT's low-rank updates beside them.

It takes the place of the block around the experts, whose children it keeps: the router, and the
experts inside the wrappers that PEFT puts around each of their parameters. PEFT's own forward adds
W + BA for every expert; here only the rows of a token's own experts are multiplied.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from regrow.kernels.expert_mlp import ExpertProjection, expert_mlp
from regrow.tasks.modeling.families import activation_of
from regrow.tasks.modeling.projections import in_compute_dtype
from regrow.tasks.modeling.quantized_experts import QuantizedStack

_PARAMETERS = ("gate_up_proj", "down_proj")


class FusedExperts(nn.Module):
    """Router and experts: children `gate` and `experts`."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        activation = activation_of(bare_experts(block.experts))
        assert activation is not None
        self.experts, self.gate = block.experts, block.gate
        self._activation = activation

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states [1, T, H]."""
        x = in_compute_dtype(hidden_states.flatten(0, -2))
        _, weights_Tk, index_Tk = self.gate(hidden_states.flatten(0, -2))
        if not _are_ready(self.experts):
            return self.experts(x, index_Tk, weights_Tk).view_as(hidden_states)
        gate_up, down = (_projection(self.experts, name) for name in _PARAMETERS)
        with torch.autocast(x.device.type, enabled=False):
            out = expert_mlp(x, index_Tk, weights_Tk, gate_up, down, activation=self._activation)
        return out.view(*hidden_states.shape[:-1], -1)


def bare_experts(module: Any) -> Any:
    """The experts themselves, inside of what PEFT has put around them."""
    while isinstance(module, ParamWrapper):
        module = module.base_layer
    return module


def why_not_experts(block: Any) -> str:
    """Why the kernels cannot take a block's place; "" when they can."""
    experts = bare_experts(getattr(block, "experts", None))
    if experts is None or not all(hasattr(experts, name) for name in _PARAMETERS):
        return "its experts are stored in another way"
    if activation_of(experts) is None:
        return "the kernels have not its activation"
    if getattr(experts, "_is_expert_parallel", False) or getattr(experts, "has_bias", False):
        return "its experts have a bias, or are spread over processes"
    return ""


def _wrappers(module: Any) -> list[Any]:
    found = []
    while isinstance(module, ParamWrapper):
        found.append(module)
        module = module.base_layer
    return found


def _are_ready(experts: Any) -> bool:
    """Whether all weights are here in full now, and all adapters are on and not merged."""
    for wrapper in _wrappers(experts):
        if wrapper.disable_adapters or wrapper.merged or len(wrapper.active_adapters) != 1:
            return False
    return not any(isinstance(p, DTensor) for p in experts.parameters())


def _projection(experts: Any, name: str) -> ExpertProjection:
    weight = getattr(bare_experts(experts), name)
    if isinstance(weight, QuantizedStack):
        weight = weight.dense()
    for wrapper in _wrappers(experts):
        (adapter,) = wrapper.active_adapters
        if wrapper.parameter_name == name and adapter in wrapper.lora_A:
            a, b = wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight
            count = len(weight)
            # PEFT stores them as one matrix: A [E r, I], B [O, r E].
            return ExpertProjection(
                weight,
                a.view(count, -1, a.shape[1]),
                b.view(len(b), -1, count).permute(2, 1, 0).contiguous(),
                float(wrapper.scaling[adapter]),
            )
    return ExpertProjection(weight)
