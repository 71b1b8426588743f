"""Gated activations act(gate) * up: SwiGLU and GEGLU in one pass forward and one backward.

Mathematics (Shazeer 2020, arXiv 2002.05202): out = act(g) * u, where act is
    silu        g sigmoid(g)
    gelu        g Phi(g), with the normal distribution's Phi
    gelu_tanh   g sigmoid(2 c (g + 0.044715 g^3)), c = sqrt(2 / pi): the tanh approximation
                (Hendrycks and Gimpel 2016, arXiv 1606.08415), for 1 + tanh(x) = 2 sigmoid(2 x).
    dg = dout * u * act'(g)      du = dout * act(g)
Only g and u are saved; the backward pass makes `out` again for whoever needs it (`lora_mlp`).

Shape legend: T tokens, F width of the hidden layer.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regrow.kernels.backend import custom_op, jit, tl, uses_triton

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
_BLOCK = 1024


# ---- reference ----


def reference(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """act(gate) * up by PyTorch, in the dtype of the inputs."""
    functional = torch.nn.functional
    if activation == "silu":
        return functional.silu(gate) * up
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return functional.gelu(gate, approximate=approximate) * up


# ---- kernels ----


@jit
def activate(g, KIND: tl.constexpr):
    """(act(g), act'(g)) in float32."""
    if KIND == "silu":
        s = tl.sigmoid(g)
        value = g * s
        slope = s * (1 + g * (1 - s))
    elif KIND == "gelu":
        phi = 0.5 * (1 + tl.erf(g * 0.7071067811865476))
        value = g * phi
        slope = phi + g * 0.3989422804014327 * tl.exp(-0.5 * g * g)
    else:
        s = tl.sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g))
        value = g * s
        slope = s + g * s * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * g * g)
    return value, slope


@jit
def _gated_forward_kernel(gate, up, out, width, gate_stride, up_stride, KIND: tl.constexpr,
                          BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    seen = column < width
    g = tl.load(gate + row * gate_stride + column, mask=seen, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=seen, other=0.0).to(tl.float32)
    value, _ = activate(g, KIND)
    tl.store(out + row * width + column, value * u, mask=seen)


@jit
def _gated_backward_kernel(dout, gate, up, both, out, width, gate_stride, up_stride,
                           KIND: tl.constexpr, HAS_OUT: tl.constexpr,
                           BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    seen = column < width
    place = row * width + column
    d = tl.load(dout + place, mask=seen, other=0.0).to(tl.float32)
    g = tl.load(gate + row * gate_stride + column, mask=seen, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=seen, other=0.0).to(tl.float32)
    value, slope = activate(g, KIND)
    dgate = both + 2 * row * width + column
    tl.store(dgate, d * u * slope, mask=seen)
    tl.store(dgate + width, d * value, mask=seen)
    if HAS_OUT:
        tl.store(out + place, value * u, mask=seen)


# ---- host ----


def _fake_forward(gate, up, activation):
    return torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)


@custom_op("gated_forward", "(Tensor gate, Tensor up, str activation) -> Tensor", _fake_forward)
def gated_forward(gate_TF: Tensor, up_TF: Tensor, activation: str) -> Tensor:
    """act(gate) * up; rows may lie apart (two halves of one matrix)."""
    if not uses_triton("gated activation", gate_TF, up_TF):
        return reference(gate_TF, up_TF, activation)
    gate_TF, up_TF = rows_without_gaps(gate_TF), rows_without_gaps(up_TF)
    rows, width = gate_TF.shape
    out = torch.empty(rows, width, dtype=gate_TF.dtype, device=gate_TF.device)
    grid = (rows, -(-width // _BLOCK))
    if rows:
        _gated_forward_kernel[grid](
            gate_TF, up_TF, out, width, gate_TF.stride(0), up_TF.stride(0), activation, _BLOCK
        )
    return out


def _fake_backward(dout, gate, up, activation, wants_out):
    rows, width = gate.shape
    return gate.new_empty(rows, 2 * width), gate.new_empty(gate.shape if wants_out else (0,))


@custom_op(
    "gated_backward",
    "(Tensor dout, Tensor gate, Tensor up, str activation, bool wants_out) -> (Tensor, Tensor)",
    _fake_backward,
)
def gated_backward(
    dout_TF: Tensor, gate_TF: Tensor, up_TF: Tensor, activation: str, wants_out: bool
) -> tuple[Tensor, Tensor]:
    """(dgate beside dup [T, 2F], the forward pass's output again or [0])."""
    if not uses_triton("gated activation", gate_TF, up_TF):
        return _backward_torch(dout_TF, gate_TF, up_TF, activation, wants_out)
    dout_TF, gate_TF, up_TF = (
        dout_TF.contiguous(),
        rows_without_gaps(gate_TF),
        rows_without_gaps(up_TF),
    )
    rows, width = gate_TF.shape
    both = dout_TF.new_empty(rows, 2 * width)
    out = torch.empty_like(dout_TF) if wants_out else dout_TF.new_empty(0)
    grid = (rows, -(-width // _BLOCK))
    if rows:
        _gated_backward_kernel[grid](
            dout_TF, gate_TF, up_TF, both, out, width, gate_TF.stride(0), up_TF.stride(0),
            activation, wants_out, _BLOCK,
        )  # fmt: skip
    return both, out


def rows_without_gaps(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _backward_torch(
    dout: Tensor, gate: Tensor, up: Tensor, activation: str, wants_out: bool
) -> tuple[Tensor, Tensor]:
    """What the kernel does, in PyTorch, for where Triton does not run."""
    exact = torch.promote_types(gate.dtype, torch.float32)
    d, g, u = (t.to(exact) for t in (dout, gate, up))
    value, slope = _activate_torch(g, activation)
    kind = gate.dtype
    out = (value * u).to(kind) if wants_out else dout.new_empty(0)
    return torch.cat([d * u * slope, d * value], 1).to(kind), out


def _activate_torch(g: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """(act(g), act'(g))."""
    if activation == "gelu":
        phi = 0.5 * (1 + torch.erf(g * math.sqrt(0.5)))
        return g * phi, phi + g * torch.exp(-0.5 * g * g) / math.sqrt(2 * math.pi)
    if activation == "silu":
        s, inner = torch.sigmoid(g), 1.0
    else:
        c = 2 * math.sqrt(2 / math.pi)
        s, inner = torch.sigmoid(c * (g + 0.044715 * g**3)), c * (1 + 3 * 0.044715 * g * g)
    return g * s, s + g * s * (1 - s) * inner


# ---- autograd and public ----


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, activation):
        width = gate.shape[-1]
        gate_TF, up_TF = gate.reshape(-1, width), up.reshape(-1, width)
        ctx.save_for_backward(gate_TF, up_TF)
        ctx.activation = activation
        out_TF = gated_forward(gate_TF, up_TF, activation)
        return torch.ops.aten._unsafe_view(
            out_TF, gate.shape
        )  # may be changed in place, a view not

    @staticmethod
    def backward(ctx, *grad_outputs):
        gate_TF, up_TF = ctx.saved_tensors
        (dout,) = grad_outputs
        dout_TF = dout.reshape(gate_TF.shape)
        both, _ = gated_backward(dout_TF, gate_TF, up_TF, ctx.activation, False)
        return *(part.view(dout.shape) for part in both.chunk(2, 1)), None


def gated_activation(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """act(gate) * up for gate and up [..., F]; activation is one of ACTIVATIONS.

    Raises:
        ValueError: when shapes or dtypes differ, or the activation is not known.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"gate and up differ: {tuple(gate.shape)} {gate.dtype}, {tuple(up.shape)} {up.dtype}"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is none of {', '.join(ACTIVATIONS)}")
    return _Gated.apply(gate, up, activation)
