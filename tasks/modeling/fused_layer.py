"""A decoder layer whose sums of the residual stream are computed with its norms.

A layer of Llama's kind is x + attention(norm(x)), then x + mlp(norm(x)). Under an adapter a sum is
made where the last product of attention or MLP is (`joint_product`, `low_rank_sum`); else the
first sum is made in the pass of the second norm. What reaches x on the way back, from its norm and
from beside it, is added in the pass of that norm's gradient. Of 22 passes over [T, H] a layer 17
are left, under adapters 16. The layer hands on one tensor as the layer before it did.

Of the last layer only positions whose next token is learnt have a gradient, but for their keys and
values. Given those rows (`LAST_ROWS`, which `LossHead.listen` lets through), it goes on with them
alone after attention, and hands on [1, n, H]; the other layers leave that argument unread.

The layer is one of a subclass of its own class, with the same name: Transformers (gradient
checkpointing, outputs that are recorded) and FSDP (what is wrapped) know it by either.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from regrow.kernels.taken_rows import taken_rows
from regrow.tasks.modeling.batches import LAST_ROWS
from regrow.tasks.modeling.fused import FusedAttention, FusedMLP, FusedNorm


class _WithSums:
    """The forward pass of a layer, in front of its own class."""

    takes_rows = False
    """Whether it is the last, and the head knows that it may get rows of [1, T, H] only."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """hidden_states [..., T, H], and by name whatever the layer's attention takes."""
        layer: Any = self
        rows = kwargs.pop(LAST_ROWS, None)
        attention = layer.self_attn
        if isinstance(attention, FusedAttention):
            kwargs["behind"] = attention.room_behind_inputs()
        behind = kwargs.get("behind")
        normed, stream = layer.input_layernorm(hidden_states, beside=True, behind=behind)
        if rows is not None and self.takes_rows:
            stream, kwargs["rows"] = taken_rows(stream, rows), rows
        if isinstance(attention, FusedAttention) and attention.adds_residual:
            stream, _ = attention(hidden_states=normed, residual=stream, **kwargs)
            normed, stream = layer.post_attention_layernorm(stream, beside=True)
        else:
            attended = attention(hidden_states=normed, **kwargs)[0]
            normed, stream = layer.post_attention_layernorm(attended, stream)
        if isinstance(layer.mlp, FusedMLP):
            return layer.mlp(normed, stream)
        return stream + layer.mlp(normed)


def takes_sums(layer: Any) -> bool:
    """Whether both norms are ours, and nobody has put another forward pass into the layer."""
    norms = (layer.input_layernorm, layer.post_attention_layernorm)
    return all(isinstance(norm, FusedNorm) for norm in norms) and "forward" not in vars(layer)


def can_take_rows(layer: Any) -> bool:
    """Whether all that it does after attention is done row by row, and by modules of ours."""
    parts: Any = layer._modules
    ours = (
        isinstance(parts.get("self_attn"), FusedAttention),
        isinstance(parts.get("mlp"), FusedMLP),
    )
    return all(ours) and isinstance(layer, _WithSums)


def fused_layer(layer: nn.Module) -> nn.Module:
    """The layer with the same children, hooks and settings, which are its own from now on."""
    made: Any = object.__new__(_class_of(type(layer)))
    made.__dict__.update(layer.__dict__)
    return made


@functools.cache
def _class_of(its: type) -> type:
    """One for all layers of a model, as theirs is."""
    return type(its.__name__, (_WithSums, its), {"__module__": __name__})
