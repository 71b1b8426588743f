"""A whole gated MLP with low-rank updates as one autograd node that makes its hidden layer twice.

Mathematics: y = down(act(gate(x)) * up(x)), each projection as in `lora_linear`, the activation as
in `swiglu`. Saved are x, gate(x) and up(x), and the h of the adapters; the product
act(gate) * up, which plain autograd keeps for the weights of `down`, is made again by the kernel
that computes dgate and dup (the selective recomputation of Korthikanti et al. 2022,
arXiv 2205.05198, where it costs nothing). With trained weights and no adapters this is the MLP of
full fine-tuning.

Tried and left out: making the skinny products of the adapters in that same kernel, while dgate,
dup and the product are in registers. It took 1.58 ms where the kernel and five GEMMs take 1.25
(8192 x 14336, r = 16, the best of eleven tile shapes, H100, 2026-11-22): registers spill.

Sharding and checkpointing: as in `lora_linear`.

Shape legend: T tokens, H hidden size, F width of the hidden layer, R ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regrow.kernels import lora_linear, swiglu
from regrow.kernels.dropout import draw_seed
from regrow.kernels.lora_linear import (
    Projection,
    cast_adapters,
    check,
    constants_of,
    group_of,
    input_gradient,
    like,
    parameter_gradients,
    project,
    rank_gradient,
    tensors_of,
)

_PER_PROJECTION = 4  # tensors


def reference(
    x: Tensor, gate: Projection, up: Projection, down: Projection, activation: str = "silu"
) -> Tensor:
    """The formula, without dropout."""
    hidden = swiglu.reference(
        lora_linear.reference(x, gate), lora_linear.reference(x, up), activation
    )
    return lora_linear.reference(hidden, down)


class _LoRAMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, activation, p, seeds, constants, *tensors):
        x_TH = x.reshape(-1, x.shape[-1])
        gate, up, down = group_of(tensors, constants)
        drops = (p, seeds[0]), (p, seeds[1])
        a_RH, bs = cast_adapters([gate, up], x.dtype)
        down_a_RF, down_bs = cast_adapters([down], x.dtype)
        (gate_TF, up_TF), h_TR = project(x_TH, [gate, up], a_RH, bs, drops[0])
        hidden_TF = swiglu.gated_forward(gate_TF, up_TF, activation)
        (y_TH,), down_h_TR = project(hidden_TF, [down], down_a_RF, down_bs, drops[1])
        casts = a_RH, down_a_RF, *bs, *down_bs
        ctx.save_for_backward(x_TH, gate_TF, up_TF, h_TR, down_h_TR, *casts, *tensors)
        ctx.activation, ctx.drops, ctx.constants = activation, drops, constants
        return like(y_TH, x)

    @staticmethod
    def backward(ctx, *grad_outputs):
        x_TH, gate_TF, up_TF, h_TR, down_h_TR, *rest = ctx.saved_tensors
        a_RH, down_a_RF, gate_b, up_b, down_b, *tensors = rest
        gate, up, down = group_of(tensors, ctx.constants)
        drop, down_drop = ctx.drops
        wants_x, _, _, _, _, *wanted = ctx.needs_input_grad
        split = 2 * _PER_PROJECTION
        (dy,) = grad_outputs
        dys = [dy.reshape(-1, dy.shape[-1])]
        dh = rank_gradient(dys, [down], [down_b])
        dhidden = input_gradient(dys, dh, down_a_RF, [down], down_drop)
        dgate, dup, hidden_TF = swiglu.gated_backward(dhidden, gate_TF, up_TF, ctx.activation, True)
        del dhidden
        of_down = parameter_gradients(
            dys, hidden_TF, down_h_TR, dh, [down], down_drop, wanted[split:]
        )
        del hidden_TF
        dys = [dgate, dup]
        dh = rank_gradient(dys, [gate, up], [gate_b, up_b])
        dx = input_gradient(dys, dh, a_RH, [gate, up], drop) if wants_x else None
        of_gate_up = parameter_gradients(dys, x_TH, h_TR, dh, [gate, up], drop, wanted[:split])
        return like(dx, dy), None, None, None, None, *of_gate_up, *of_down


def lora_mlp(
    x: Tensor,
    gate: Projection,
    up: Projection,
    down: Projection,
    *,
    activation: str = "silu",
    dropout: float = 0.0,
) -> Tensor:
    """down(act(gate(x)) * up(x)) for x [..., H], in the dtype of x.

    Args:
        activation: one of `swiglu.ACTIVATIONS`.
        dropout: probability of the low-rank paths' dropout; gate and up share a mask.

    Raises:
        ValueError: when shapes do not fit together, or the activation is not known.
    """
    widths = check(x.shape[-1], gate), check(x.shape[-1], up)
    if -1 not in widths:
        if widths[0] != widths[1]:
            raise ValueError(f"gate has {widths[0]} outputs and up has {widths[1]}")
        check(widths[0], down)
    if activation not in swiglu.ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is none of {', '.join(swiglu.ACTIVATIONS)}")
    group = (gate, up, down)
    seeds = (draw_seed(), draw_seed()) if dropout > 0 else (0, 0)
    constants = constants_of(group)
    return _LoRAMLP.apply(x, activation, dropout, seeds, constants, *tensors_of(group))
