"""Layers that compute with our kernels what a Transformers layer computes, on the same parameters.

Each takes the place of one module of a loaded model and owns that module's children under the same
names: state dicts, adapters, sharding and checkpoints do not notice. Where the weights are not at
hand in full (an outer wrapper shards each child by itself) or an adapter is off, it computes as the
module before did.

Shape legend: T tokens, N query heads, K key heads, D head size, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from regrow.kernels.lora_linear import lora_linear
from regrow.kernels.lora_mlp import SLICE_BYTES, lora_mlp
from regrow.kernels.neighbours import Gap
from regrow.kernels.projection import Rooms, gap_for, room_for
from regrow.kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_beside
from regrow.kernels.rope import rope
from regrow.kernels.swiglu import gated_activation
from regrow.kernels.taken_rows import taken_rows
from regrow.tasks.modeling.attention import packed_attention_forward
from regrow.tasks.modeling.families import Family, activation_of, window_of
from regrow.tasks.modeling.projections import (
    are_ready,
    dropout_of,
    in_compute_dtype,
    projections_of,
)
from regrow.tasks.modeling.rounded_weights import RoundedWeights

INPUTS, BELOW, OUTPUT = "inputs", "below", "output"
"""Layers whose weights may be laid anew: of one input, with room for their B beside them and for
their A below; of one input, with room below alone; and one whose output goes to the stream."""


class FusedNorm(nn.Module):
    """An RMS norm, with `weight` where the other had it."""

    def __init__(self, norm: Any, offset: float) -> None:
        super().__init__()
        self.weight = norm.weight
        self.eps: float = epsilon_of(norm)
        self.offset = offset

    def forward(
        self,
        x: Tensor,
        stream: Tensor | None = None,
        *,
        beside: bool = False,
        behind: Gap | None = None,
    ) -> Any:
        """The norm of x [..., H]; with `stream` (norm, sum) of the two; `beside` (norm, x), the
        norm perhaps with room `behind` it.

        A weight of a wider type widens the norm, as it does in Llama's. Not under autocast, where
        what follows would only bring it back.
        """
        wide = x.dtype
        if not self.offset and not torch.is_autocast_enabled(x.device.type):
            wide = torch.promote_types(x.dtype, self.weight.dtype)
        how: Any = {"offset": self.offset}
        if wide == x.dtype and beside:
            return rms_norm_beside(x, self.weight, self.eps, behind=behind, **how)
        if wide == x.dtype and stream is not None and stream.dtype == x.dtype:
            return add_rms_norm(x, stream, self.weight, self.eps, **how)
        total = x if stream is None else stream + x
        norm = rms_norm(
            total.to(torch.promote_types(total.dtype, wide)), self.weight, self.eps, **how
        )
        return (norm, total) if beside or stream is not None else norm

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


def epsilon_of(norm: Any) -> float:
    """What a norm of Transformers adds to the mean square."""
    return float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)


class FusedMLP(nn.Module):
    """A gated MLP with or without LoRA: children `gate_proj`, `up_proj`, `down_proj`."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        activation = activation_of(mlp)
        assert activation is not None
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.act_fn = mlp.act_fn
        self._activation = activation
        self.rounded: RoundedWeights | None = None
        self.slice_bytes = SLICE_BYTES
        self.rooms: dict[str, Rooms] = {}

    def weights_to_lay(self) -> dict[str, Sequence[nn.Module]]:
        """Layers whose weights may be laid anew (`joint_weights`), for `rooms`."""
        return {BELOW: (self.gate_proj, self.up_proj), OUTPUT: (self.down_proj,)}

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [..., H] -> [..., H], to which `residual` is added."""
        layers = (self.gate_proj, self.up_proj, self.down_proj)
        if not are_ready(layers):
            y = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
            return y if residual is None else residual + y
        x = in_compute_dtype(x)
        if residual is not None and residual.dtype != x.dtype:
            return residual + self.forward(x)
        gate, up = projections_of(layers[:2], self.rounded, x.dtype, self.rooms.get(BELOW))
        (down,) = projections_of(layers[2:], self.rounded, x.dtype, self.rooms.get(OUTPUT))
        with torch.autocast(x.device.type, enabled=False):
            how: Any = {"activation": self._activation, "residual": residual}
            how |= {"dropout": dropout_of(layers), "slice_bytes": self.slice_bytes}
            return lora_mlp(x, gate, up, down, **how)


class FusedGateUpMLP(nn.Module):
    """A gated MLP whose gate and up are one matrix (Phi-3): `gate_up_proj`, `down_proj`."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        activation = activation_of(mlp)
        assert activation is not None
        self.gate_up_proj, self.down_proj = mlp.gate_up_proj, mlp.down_proj
        self.activation_fn = mlp.activation_fn
        self._activation = activation
        self.rounded: RoundedWeights | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not are_ready((self.gate_up_proj, self.down_proj)):
            gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
            return self.down_proj(up * self.activation_fn(gate))
        (both,) = fused_linear(x, self.gate_up_proj, rounded=self.rounded)
        gate, up = both.chunk(2, dim=-1)
        hidden = gated_activation(gate, up, self._activation)
        return fused_linear(hidden, self.down_proj, rounded=self.rounded)[0]


def fused_linear(
    x: Tensor,
    *layers: nn.Module,
    rounded: RoundedWeights | None = None,
    residual: Tensor | None = None,
    rooms: Rooms | None = None,
    behind: Gap | None = None,
) -> tuple[Tensor, ...]:
    """The outputs of layers of one input, with their adapters, as one autograd node.

    Args:
        residual: is added to the only output.
        rooms: next to the weights.
        behind: room that may be behind x.
    """
    x = in_compute_dtype(x)
    if residual is not None and residual.dtype != x.dtype:
        return (residual + fused_linear(x, *layers, rounded=rounded)[0],)
    with torch.autocast(x.device.type, enabled=False):
        group = projections_of(layers, rounded, x.dtype, rooms)
        how: Any = {"dropout": dropout_of(layers), "residual": residual, "behind": behind}
        return lora_linear(x, *group, **how)


class FusedAttention(nn.Module):
    """Attention on packed rows: Q, K and V as one node, rotary embedding with the heads' norms.

    Its own forward serves packed rows; everything else (generation, another attention
    implementation) goes to the module before, whose children it shares.
    """

    def __init__(self, attention: Any, family: Family) -> None:
        super().__init__()
        for name, child in attention.named_children():
            self.add_module(name, child)
        self._before = (attention,)  # in a tuple: no child, its parameters have one name
        self._inputs = input_names(attention)
        self.config, self.layer_idx = attention.config, attention.layer_idx
        self.head_dim, self.scaling = attention.head_dim, attention.scaling
        self.is_causal = attention.is_causal
        self.sliding_window = window_of(attention, family)
        self._softcap = attention.attn_logit_softcapping if family.softcap else None
        self._rotates = bool(getattr(attention, "use_rope", True))
        self._offset = family.norm_offset
        self.rounded: RoundedWeights | None = None
        self.rooms: dict[str, Rooms] = {}
        norm = getattr(attention, "q_norm", None)
        self._eps = 0.0 if norm is None else epsilon_of(norm)

    @property
    def parts(self) -> list[str]:
        """What runs in the kernel beside the products."""
        return ["rope"] * self._rotates + ["qk_norm"] * (self._rotates and self._eps > 0)

    @property
    def adds_residual(self) -> bool:
        """Whether adding one to the result costs less here than in the norm after it."""
        return isinstance(self._modules["o_proj"], LoraLayer)

    def weights_to_lay(self) -> dict[str, Sequence[nn.Module]]:
        """Layers whose weights may be laid anew (`joint_weights`), for `rooms`."""
        children: Any = self._modules
        return {INPUTS: self._input_layers(), OUTPUT: [children["o_proj"]]}

    def _input_layers(self) -> list[nn.Module]:
        children: Any = self._modules
        return [children[name] for name in self._inputs]

    def room_behind_inputs(self) -> Gap | None:
        """Columns that whoever makes the inputs should leave behind them."""
        return room_for(self.rooms.get(INPUTS))

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        residual: Tensor | None = None,
        rows: Tensor | None = None,
        behind: Gap | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [1, T, H]; as Transformers calls an attention layer.

        Args:
            residual: is added to the result.
            rows: those of the result that are wanted, and that `residual` has.
            behind: room that may be behind `hidden_states`.
        """
        children: Any = self._modules
        layers = self._input_layers()
        output: nn.Module = children["o_proj"]
        packed = past_key_values is None and kwargs.get("cu_seq_lens_q") is not None
        if not packed or not are_ready([*layers, output]):
            y, weights = self._before[0](
                hidden_states=hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
            y = y if rows is None else taken_rows(y, rows)
            return y if residual is None else residual + y, weights
        turned = self._turned(*self._heads(hidden_states, layers, behind), position_embeddings)
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in turned)
        kwargs |= {"sliding_window": self.sliding_window, "softcap": self._softcap}
        rooms = self.rooms.get(OUTPUT)
        behind = room_for(rooms) if rows is None else None
        out, _ = packed_attention_forward(
            self, q, k, v, attention_mask, scaling=self.scaling, behind=behind, **kwargs
        )
        x = out.flatten(2) if rows is None else taken_rows(out.flatten(2), rows)
        how: Any = {"rounded": self.rounded, "residual": residual}
        return fused_linear(x, output, rooms=rooms, behind=behind, **how)[0], None

    def _heads(
        self, hidden: Tensor, layers: list[nn.Module], behind: Gap | None
    ) -> tuple[list[Tensor], Gap | None]:
        """(q [T, N, D], k and v [T, K, D]; what to leave free behind their gradients)."""
        hidden = in_compute_dtype(hidden)
        group = projections_of(layers, self.rounded, hidden.dtype, self.rooms.get(INPUTS))
        gap = gap_for(group, hidden.dtype) if self._rotates and len(group) > 1 else None
        with torch.autocast(hidden.device.type, enabled=False):
            how: Any = {"dropout": dropout_of(layers), "gap": gap, "behind": behind}
            found = lora_linear(hidden, *group, **how)
        if len(found) == 1:  # Phi-3: one matrix for the three
            heads: Any = self.config
            sizes = (heads.num_attention_heads, *2 * (heads.num_key_value_heads,))
            found = found[0].split([size * self.head_dim for size in sizes], dim=-1)
        return [x.reshape(hidden.shape[1], -1, self.head_dim) for x in found], gap

    def _turned(
        self, heads: list[Tensor], gap: Gap | None, angles: tuple[Tensor, Tensor]
    ) -> Sequence[Tensor]:
        if not self._rotates:
            return heads
        q_TND, k_TKD, v_TKD = heads
        half = angles[0].shape[-1] // 2  # the second half repeats the first
        cos, sin = (angle[0, :, :half] for angle in angles)
        norms: dict[str, Any] = {}
        if self._eps:
            children: Any = self._modules
            names = {"q_weight_D": "q_norm", "k_weight_D": "k_norm"}
            norms = {name: children[norm].weight for name, norm in names.items()}
            norms |= {"eps": self._eps, "offset": self._offset}
        if gap is None:
            return *rope(q_TND, k_TKD, cos, sin, **norms), v_TKD
        return rope(q_TND, k_TKD, cos, sin, v_TKD=v_TKD, gap=gap, **norms)


def input_names(attention: nn.Module) -> tuple[str, ...]:
    """The children that make queries, keys and values."""
    return ("qkv_proj",) if hasattr(attention, "qkv_proj") else ("q_proj", "k_proj", "v_proj")
