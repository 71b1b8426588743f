"""A whole gated MLP with low-rank updates as one autograd node that makes its hidden layer twice.

Mathematics: y = down(act(gate(x)) * up(x)), each projection as in `lora_linear`, the activation as
in `swiglu`. Saved are x, gate(x) and up(x), and the h of the adapters; the product
act(gate) * up, which plain autograd keeps for the weights of `down`, is made again by the kernel
that computes dgate and dup (the selective recomputation of Korthikanti et al. 2022,
arXiv 2205.05198, where it costs nothing). With trained weights and no adapters this is the MLP of
full fine-tuning.

Where all three have adapters of a small rank, the activation's kernels make what lies next to
them: h B^T of gate and up, h of down, dh A and dA of down (`gated_lora`); gate(x) and up(x) are
then saved without their low-rank parts. Tried and left out: dh and dB of gate and up in that same
kernel, while dgate and dup are in registers. They spill: with them and dA it took 1.58 ms where the
plain kernel and five GEMMs take 1.25 (8192 x 14336, r = 16, the best of eleven tiles, H100,
2026-11-22).

Long rows: gate, up, their product and the gradients of the three are 82 GB for 400,000 tokens of a
width of 14336. Above `SLICE_BYTES` the tokens go through in slices, and only x is saved; gate and
up are made again in the backward pass, which at such lengths is lost beside attention (two of its
GEMMs are 1.9e13 FLOPs a layer of 3.6e14 at 75,000 tokens, less beyond). Gradients of parameters
are summed over the slices in float32.

Sharding and checkpointing: as in `lora_linear`. The node is two: the first saves all that the
backward pass needs, the second makes y and saves nothing. Where a checkpoint computes a layer
again, torch stops as soon as everything is saved that was (its "early stop"): the product of
`down`, a third of the MLP, is not made a second time, and of a row in slices nothing at all.

Shape legend: T tokens, H hidden size, F width of the hidden layer, R ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from regrow.kernels import gated_lora, lora_linear, swiglu
from regrow.kernels.dropout import draw_seed
from regrow.kernels.float8 import Float8Weight
from regrow.kernels.lora_linear import (
    cast_adapters,
    input_gradient,
    like,
    parameter_gradients,
    project,
    project_apart,
    rank_gradients,
    through_base,
)
from regrow.kernels.neighbours import Gap
from regrow.kernels.nf4 import Nf4Weight, dequantize_below
from regrow.kernels.projection import (
    ROW_BYTES,
    TENSORS,
    Drop,
    Projection,
    Rooms,
    check,
    check_residual,
    constants_of,
    dropped,
    from_kept,
    group_of,
    room_for,
    tensors_of,
    to_keep,
)

SLICE_BYTES = 4 << 30
"""Of gate and up together, above which the tokens go through in slices: 75,000 tokens of a width of
14336 in bfloat16, below the longest rows that fit otherwise."""
SCARCE_SLICE_BYTES = 160 << 20
"""The same where memory is short: 2,900 of those tokens, from where slices take less, although the
matrices of all three layers lie beside them."""
_LARGEST_SLICE = 1 << 30  # bytes of gate and up: 18,700 of those tokens keep every GEMM full
_LARGER = 1.5  # times those bytes is a slice at most: where short, two slices of two rows of 4096
_ROW_MULTIPLE = 128  # rows of a GEMM tile
_USUAL_WIDTH = 4  # times the hidden size, where only a weight's function knows

Drops = tuple[Drop, Drop]  # of gate and up, and of down


def reference(
    x: Tensor, gate: Projection, up: Projection, down: Projection, activation: str = "silu"
) -> Tensor:
    """The formula, without dropout."""
    hidden = swiglu.reference(
        lora_linear.reference(x, gate), lora_linear.reference(x, up), activation
    )
    return lora_linear.reference(hidden, down)


# ---- host ----


class Activation(NamedTuple):
    """Between the projections."""

    kind: str
    with_adapters: bool
    """Whether its kernels make what of the low-rank updates lies next to it (`gated_lora`)."""
    behind: Gap | None
    """Room behind the hidden layer, where the product of `down` is of use for it."""


@dataclass(frozen=True)
class _Layer:
    """The three projections, and their adapters as the products take them."""

    group: list[Projection]  # gate, up, down
    casts: list[Any]  # A of gate and up, A of down, and B of each of the three
    activation: Activation

    @classmethod
    def of(cls, kept: Sequence[Any], constants: Any, activation: Any, dtype: Any) -> _Layer:
        """From the tensors, or what `to_keep` gave."""
        casts, group = from_kept(kept, constants)
        if casts:
            return cls(group, casts, activation)
        gate, up, down = group
        a_RH, bs = cast_adapters([gate, up], dtype)
        down_a_RF, down_bs = cast_adapters([down], dtype)
        return cls(group, [a_RH, down_a_RF, *bs, *down_bs], activation)

    def to_keep(self, tensors: Sequence[Any], dtype: torch.dtype) -> list[Any]:
        """What of the tensors it is made of autograd keeps, for `of`."""
        return to_keep(self.group, tensors, self.casts, dtype)

    def inner(
        self, x_TH: Tensor, drop: Drop, work_TK: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(gate [T, F], up [T, F], h [T, R] of both); in `work`, see there, where it is given."""
        a_RH, _, *bs, _ = self.casts
        group = self.group[:2]
        if self.activation.with_adapters:
            gate_TF, up_TF, h_TR = project_apart(x_TH, group, a_RH, drop, work_TK)
            return gate_TF, up_TF, h_TR
        (gate_TF, up_TF), h_TR = project(x_TH, group, a_RH, bs, drop)
        return gate_TF, up_TF, h_TR

    def hidden(
        self, gate_TF: Tensor, up_TF: Tensor, h_TR: Tensor | None, drop: Drop
    ) -> tuple[Tensor, Tensor | None]:
        """(act(gate) * up [T, F], h [T, R] of down); given what `inner` gives."""
        kind, with_adapters, behind = self.activation
        down_a_RF = self.casts[1]
        if with_adapters:
            given = gate_TF, up_TF, *self._adapters(h_TR), down_a_RF, kind
            hidden_TF, down_h_TR = gated_lora.forward(*given, behind.columns if behind else 0)
            if behind is not None:
                behind.is_behind(hidden_TF)
            return hidden_TF, down_h_TR
        hidden_TF = swiglu.gated_forward(gate_TF, up_TF, kind)
        return hidden_TF, None if down_a_RF is None else dropped(hidden_TF, drop) @ down_a_RF.t()

    def _adapters(self, h_TR: Any) -> tuple[Tensor, Tensor, float, Tensor, Tensor, float]:
        """h, B and scaling of gate, and of up."""
        gate, up, _ = self.group
        h_gate, h_up = h_TR.split([gate.rank, up.rank], dim=1)
        return h_gate, self.casts[2], gate.scaling, h_up, self.casts[3], up.scaling

    def outer(self, hidden_TF: Tensor, h_TR: Tensor | None, residual_TH: Tensor | None) -> Tensor:
        """y [T, H]."""
        down, bs, behind = self.group[2:], self.casts[4:], self.activation.behind
        return _outer(hidden_TF, h_TR, down, bs, residual_TH, behind)

    def work(self, like: Tensor) -> Tensor | None:
        """Room for dgate, dup and dh of both, next to each other [T, 2F + R and more].

        None where the kernels do not take the adapters.
        """
        if not self.activation.with_adapters:
            return None
        ranks, multiple = len(self.casts[0]), ROW_BYTES // like.element_size()
        width = len(self.casts[2])  # of B of gate
        return like.new_empty(len(like), 2 * width + -(-ranks // multiple) * multiple)

    def back(
        self,
        dy_TH: Tensor,
        saved: Sequence[Any],
        drops: Drops,
        wants_x: bool,
        wanted: list[bool],
        work_TK: Tensor | None = None,
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """(dx, gradients of `tensors_of(group)`).

        Args:
            saved: x, gate, up, their h and that of down.
            work_TK: where gate and up lie, if they may be overwritten.
        """
        x_TH, gate_TF, up_TF, h_TR, down_h_TR = saved
        a_RH, _, *bs = self.casts
        inner, outer = self.group[:2], self.group[2:]
        split = 2 * TENSORS
        dh, dbs = rank_gradients([dy_TH], down_h_TR, outer, bs[2:])
        hidden_TF = da_RF = inner_dh = None
        if self.activation.with_adapters:
            dgate, dup, inner_dh, da_RF = self._back_inside(dy_TH, dh, saved, work_TK)
        else:
            through = input_gradient([dy_TH], dh, self.casts[1], outer, drops[1])
            kind = self.activation.kind
            both, hidden_TF = swiglu.gated_backward(through, gate_TF, up_TF, kind, True)
            dgate, dup = both.chunk(2, 1)
            del both, through
        of_down = parameter_gradients(
            [dy_TH], hidden_TF, dbs, dh, outer, drops[1], wanted[split:], da_RF
        )
        del hidden_TF
        dys = [dgate, dup]
        dh, dbs = rank_gradients(dys, h_TR, inner, bs[:2], inner_dh)
        dx = input_gradient(dys, dh, a_RH, inner, drops[0]) if wants_x else None
        of_inner = parameter_gradients(dys, x_TH, dbs, dh, inner, drops[0], wanted[:split])
        return dx, of_inner + of_down

    def _back_inside(
        self, dy_TH: Tensor, dh_TR: Any, saved: Sequence[Any], work_TK: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(dgate, dup, room for dh of both, dA of down).

        Without `work`, d = dy W waits where dup will be; with it, gate and up do.
        """
        _, gate_TF, up_TF, h_TR, _ = saved
        width, ranks = gate_TF.shape[1], len(self.casts[0])
        both = self.work(gate_TF) if work_TK is None else work_TK
        assert both is not None
        dgate, dup, inner_dh = both[:, : 2 * width + ranks].split([width, width, ranks], 1)
        d_TF = through_base(dy_TH, self.group[2], dup if work_TK is None else None)
        given = d_TF, gate_TF, up_TF, *self._adapters(h_TR), self.casts[1], dh_TR
        return dgate, dup, inner_dh, gated_lora.backward(*given, both, self.activation.kind)


def _outer(
    hidden_TF: Tensor,
    h_TR: Tensor | None,
    down: Sequence[Projection],
    bs: Sequence[Tensor | None],
    residual_TH: Tensor | None,
    behind: Gap | None,
) -> Tensor:
    """y [T, H]."""
    free_TJ = None if behind is None else behind.behind([hidden_TF])
    (y_TH,), _ = project(hidden_TF, down, None, bs, (0.0, 0), h_TR, residual_TH, free_TJ)
    return y_TH


def _slice_rows(tokens: int, width: int, element: int, most: int) -> int:
    """Rows of a slice; 0 for no slices, where gate and up fit into `most` bytes."""
    whole = 2 * width * element * tokens
    if whole <= most:
        return 0
    slices = max(2, math.ceil(whole / min(_LARGER * most, _LARGEST_SLICE)))
    return -(-tokens // slices // _ROW_MULTIPLE) * _ROW_MULTIPLE


def _materialized(layer: _Layer, dtype: Any) -> _Layer:
    """With the matrices themselves, so that not every slice makes them anew."""
    inner, a_RH = _neighbours(layer.group[:2], layer.casts[0], dtype)
    group = [
        p if isinstance(p.weight, Float8Weight) else replace(p, rounded=p.matrix(dtype))
        for p in [*inner, layer.group[2]]
    ]
    return replace(layer, group=group, casts=[a_RH, *layer.casts[1:]])


def _neighbours(
    inner: Sequence[Projection], a_RH: Tensor | None, dtype: Any
) -> tuple[Sequence[Projection], Tensor | None]:
    """Gate and up; of 4 bits one under the other, with their A behind both, for all slices."""
    gate, up = inner
    if not (isinstance(gate.weight, Nf4Weight) and isinstance(up.weight, Nf4Weight)):
        return inner, a_RH
    ranks, width = gate.rank + up.rank, gate.weight.shape[0]
    joint = dequantize_below([gate.weight, up.weight], dtype, ranks)
    made = joint.split([width, up.weight.shape[0], ranks])
    group = [replace(gate, rounded=made[0]), replace(up, rounded=made[1])]
    if a_RH is None:
        return group, None
    return [group[0], replace(group[1], room=made[2])], made[2].copy_(a_RH)


def _slices(tokens: int, rows: int, p: float, seeds: Sequence[int]) -> Iterator[tuple[Any, Drops]]:
    """(slice, dropouts) of `rows` tokens each; every slice has masks of its own."""
    for number, start in enumerate(range(0, tokens, rows)):
        yield slice(start, start + rows), ((p, seeds[0] + number), (p, seeds[1] + number))


def _added(total: list[Any], more: Sequence[Any]) -> None:
    """total += more, summed in float32 at least; the same of them are None each time."""
    there = [i for i, gradient in enumerate(more) if gradient is not None]
    if there and total[there[0]] is not None:
        at_once: Any = torch._foreach_add_  # pyright: ignore[reportPrivateImportUsage]
        at_once([total[i] for i in there], [more[i] for i in there])
        return
    for i in there:
        total[i] = more[i].to(torch.promote_types(more[i].dtype, torch.float32))


# ---- autograd ----


class _LoRAMLP(torch.autograd.Function):
    """Everything but the last product; a token stands for y, whose gradient is the token's."""

    @staticmethod
    def forward(ctx, x, activation, p, seeds, constants, *tensors):
        x_TH = x.reshape(-1, x.shape[-1])
        drops = (p, seeds[0]), (p, seeds[1])
        layer = _Layer.of(tensors, constants, activation, x.dtype)
        gate_TF, up_TF, h_TR = layer.inner(x_TH, drops[0])
        hidden_TF, down_h_TR = layer.hidden(gate_TF, up_TF, h_TR, drops[1])
        kept = layer.to_keep(tensors, x.dtype)
        ctx.save_for_backward(x_TH, gate_TF, up_TF, h_TR, down_h_TR, *kept)
        ctx.activation, ctx.drops, ctx.constants = activation, drops, constants
        made = [t for t in (hidden_TF, down_h_TR) if t is not None]
        ctx.mark_non_differentiable(*made)
        ctx.set_materialize_grads(False)
        return _token(x, layer), *made

    @staticmethod
    def backward(ctx, *grad_outputs):
        everything = ctx.saved_tensors  # looked at once: a checkpoint makes them at that moment
        saved, kept = everything[:5], everything[5:]
        layer = _Layer.of(kept, ctx.constants, ctx.activation, saved[0].dtype)
        wants_x, _, _, _, _, *wanted = ctx.needs_input_grad
        dy = grad_outputs[0]
        dy_TH = dy.reshape(-1, dy.shape[-1])
        dx, grads = layer.back(dy_TH, saved, ctx.drops, wants_x, wanted)
        return like(dx, dy), None, None, None, None, *grads


class _SlicedLoRAMLP(torch.autograd.Function):
    """The same, slice by slice: only x is saved, and gate and up are made again."""

    @staticmethod
    def forward(ctx, x, activation, p, seeds, constants, rows, *tensors):
        layer = _Layer.of(tensors, constants, activation, x.dtype)
        ctx.save_for_backward(x.reshape(-1, x.shape[-1]), *layer.to_keep(tensors, x.dtype))
        ctx.settings = activation, p, seeds, constants, rows
        ctx.set_materialize_grads(False)
        return _token(x, layer)

    @staticmethod
    def backward(ctx, *grad_outputs):
        x_TH, *kept = ctx.saved_tensors
        activation, p, seeds, constants, rows = ctx.settings
        layer = _materialized(_Layer.of(kept, constants, activation, x_TH.dtype), x_TH.dtype)
        wants_x, _, _, _, _, _, *wanted = ctx.needs_input_grad
        (dy,) = grad_outputs
        dy_TH = dy.reshape(-1, dy.shape[-1])
        dx_TH = torch.empty_like(x_TH) if wants_x else None
        total: list[Any] = [None] * len(wanted)
        for part, drops in _slices(len(x_TH), rows, p, seeds):
            work_TK = layer.work(x_TH[part])
            gate_TF, up_TF, h_TR = layer.inner(x_TH[part], drops[0], work_TK)
            if work_TK is not None and h_TR is not None:
                h_TR = h_TR.clone()  # dh takes its place
            down_h_TR = layer.hidden(gate_TF, up_TF, h_TR, drops[1])[1]
            saved = x_TH[part], gate_TF, up_TF, h_TR, down_h_TR
            del gate_TF, up_TF
            dx, grads = layer.back(dy_TH[part], saved, drops, wants_x, wanted, work_TK)
            _added(total, grads)
            if dx_TH is not None and dx is not None:
                dx_TH[part] = dx
            del saved, dx, work_TK  # else the next slice's would lie beside them
        return like(dx_TH, dy), None, None, None, None, None, *total


class _Down(torch.autograd.Function):
    """y from the hidden layer, for a token of `_LoRAMLP`; nothing is saved here."""

    @staticmethod
    def forward(ctx, token, residual, constants, behind, hidden_TF, h_TR, *tensors):
        down = group_of(tensors, constants)
        factors = down[0].factors(token.dtype)
        bs = [None if factors is None else factors[1]]
        residual_TH = None if residual is None else residual.reshape(-1, residual.shape[-1])
        y_TH = _outer(hidden_TF, h_TR, down, bs, residual_TH, behind)
        return like(y_TH, token)

    @staticmethod
    def backward(ctx, *grad_outputs):
        _, wants_residual, *others = ctx.needs_input_grad
        (dy,) = grad_outputs
        return dy, dy if wants_residual else None, *(None,) * len(others)


class _InSlices(torch.autograd.Function):
    """y from x, for a token of `_SlicedLoRAMLP`; nothing is saved here."""

    @staticmethod
    def forward(ctx, token, x, residual, activation, p, seeds, constants, rows, *tensors):
        x_TH = x.reshape(-1, x.shape[-1])
        residual_TH = None if residual is None else residual.reshape(-1, residual.shape[-1])
        layer = _materialized(_Layer.of(tensors, constants, activation, x.dtype), x.dtype)
        y_TH = x_TH.new_empty(len(x_TH), token.shape[-1])
        for part, drops in _slices(len(x_TH), rows, p, seeds):
            gate_TF, up_TF, h_TR = layer.inner(x_TH[part], drops[0])
            hidden_TF, h_TR = layer.hidden(gate_TF, up_TF, h_TR, drops[1])
            del gate_TF, up_TF
            beside = None if residual_TH is None else residual_TH[part]
            y_TH[part] = layer.outer(hidden_TF, h_TR, beside)
        return like(y_TH, x)

    @staticmethod
    def backward(ctx, *grad_outputs):
        _, _, wants_residual, *others = ctx.needs_input_grad
        (dy,) = grad_outputs
        return dy, None, dy if wants_residual else None, *(None,) * len(others)


def _token(x: Tensor, layer: _Layer) -> Tensor:
    """One number in the shape of y: what autograd takes for the result until it is made."""
    down = layer.group[2]
    shapes = [down.b.shape] if down.b is not None else []
    shapes += [down.weight.shape] if isinstance(down.weight, Tensor) else []
    width = shapes[0][0] if shapes else x.shape[-1]
    return x.new_empty_strided((*x.shape[:-1], width), (0,) * x.dim())


def _has_small_adapters(group: Sequence[Projection]) -> bool:
    """Whether `gated_lora` knows these updates, and nothing but them wants the hidden layer."""
    gate, up, down = group
    is_trained = isinstance(down.weight, Tensor) and down.weight.requires_grad
    has_bias = gate.bias is not None or up.bias is not None
    small = all(0 < p.rank <= gated_lora.LARGEST_RANK for p in group)
    return small and not has_bias and not is_trained


# ---- public ----


def lora_mlp(
    x: Tensor,
    gate: Projection,
    up: Projection,
    down: Projection,
    *,
    activation: str = "silu",
    dropout: float = 0.0,
    residual: Tensor | None = None,
    slice_bytes: int = SLICE_BYTES,
) -> Tensor:
    """down(act(gate(x)) * up(x)) for x [..., H], in the dtype of x.

    Args:
        activation: one of `swiglu.ACTIVATIONS`.
        dropout: probability of the low-rank paths' dropout; gate and up share a mask.
        residual: like the result, which it is added to.
        slice_bytes: where gate and up of all tokens take more, they are not saved but made again,
            a slice of the tokens at a time, of at most half as much again.

    Raises:
        ValueError: when shapes do not fit together, or the activation is not known.
    """
    widths = check(x.shape[-1], gate), check(x.shape[-1], up)
    outputs = -1
    if -1 not in widths:
        if widths[0] != widths[1]:
            raise ValueError(f"gate has {widths[0]} outputs and up has {widths[1]}")
        outputs = check(widths[0], down)
    if residual is not None:
        check_residual(residual, x, [outputs])
    if activation not in swiglu.ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is none of {', '.join(swiglu.ACTIVATIONS)}")
    group = (gate, up, down)
    seeds = (draw_seed(), draw_seed()) if dropout > 0 else (0, 0)
    late = dropout == 0 and _has_small_adapters(group) and gated_lora.takes(x)
    rooms = Rooms(beside=(down.beside,)) if late and down.beside is not None else None
    settings = Activation(activation, late, room_for(rooms)), dropout, seeds, constants_of(group)
    tokens = x.numel() // max(x.shape[-1], 1)
    width = max(*widths, 0) or _USUAL_WIDTH * x.shape[-1]
    rows = _slice_rows(tokens, width, x.element_size(), slice_bytes)
    tensors = tensors_of(group)
    if rows:
        token = _SlicedLoRAMLP.apply(x, *settings, rows, *tensors)
        return _InSlices.apply(token, x, residual, *settings, rows, *tensors)
    token, hidden, *h = _LoRAMLP.apply(x, *settings, *tensors)
    of_down = tensors_of([down])
    low = h[0] if h else None
    given = constants_of([down]), settings[0].behind, hidden, low
    return _Down.apply(token, residual, *given, *of_down)
