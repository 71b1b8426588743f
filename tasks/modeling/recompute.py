"""How much of a layer is computed again in the backward pass: policies of gradient checkpointing.

A policy is said in the words of `torch.utils.checkpoint` alone, so that any model that checkpoints
its layers takes it. `choose_policy` picks the one that computes least again and still fits.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

POLICIES = ("none", "selective", "full", "offload")
"""none: all activations stay. selective: attention's results stay, the rest is computed again.
full: only each layer's input stays. offload: even that waits in the host's memory."""

# Operations whose results stay under "selective": each attention of `kernels.packed_attention`.
# Their cost grows with the square of the length, their results do not (Korthikanti et al. 2022,
# arXiv 2205.05198, section 5, keeps the others for the same reason in reverse).
_KEPT = (
    "_flash_attention_forward",
    "_varlen_attn",
    "_flash_attn_varlen_forward",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
)


def checkpoint_arguments(policy: str, use_reentrant: bool) -> dict[str, Any] | None:
    """Arguments of `torch.utils.checkpoint.checkpoint`; None where nothing is computed again."""
    assert policy in POLICIES, policy
    if policy == "none":
        return None
    if policy == "selective":
        contexts = functools.partial(create_selective_checkpoint_contexts, keep_attention)
        return {"use_reentrant": False, "context_fn": contexts}
    return {"use_reentrant": use_reentrant}


def keep_attention(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """torch's policy function: what becomes of one operation's result."""
    name = str(operation).partition(".")[2].partition(".")[0]
    return CheckpointPolicy.MUST_SAVE if name in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


@dataclass(frozen=True)
class LayerSizes:
    """What decides the activations of a transformer layer, in elements of a token."""

    layers: int
    hidden: int
    width: int
    """Of the MLP; for experts the sum of the chosen ones."""
    heads: int
    """Query heads times their size."""
    key_heads: int

    @classmethod
    def of(cls, config: Any) -> LayerSizes:
        """From the configuration of a Transformers model."""
        text = config.get_text_config()
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        named = (getattr(text, name, None) for name in ("intermediate_size", "ffn_dim", "n_inner"))
        width = next((width for width in named if width), 4 * text.hidden_size)
        if getattr(text, "moe_intermediate_size", None):
            width = text.moe_intermediate_size * text.num_experts_per_tok
        keys = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        return cls(
            text.num_hidden_layers,
            text.hidden_size,
            width,
            text.num_attention_heads * size,
            keys * size,
        )

    def kept_bytes(self, policy: str, tokens: int, element: int) -> float:
        """Bytes of the activations of all layers that wait for the backward pass, about.

        Counted from what the layers save with our kernels: two residual sums, the two norms'
        results, q, k, v before and after rotation, attention's result; gate and up.

        Args:
            element: bytes of an activation.
        """
        attention = self.heads
        if policy == "none":
            rotated = 2 * self.heads + 3 * self.key_heads
            each = 4 * self.hidden + rotated + attention + 2 * self.width
        elif policy == "selective":
            each = self.hidden + attention
        else:
            each = self.hidden if policy == "full" else 0
        return float(element) * tokens * self.layers * each

    def working_bytes(self, tokens: int, element: int) -> float:
        """Bytes that one layer's backward pass holds at its height, recomputed ones included."""
        return float(element) * tokens * (8 * self.hidden + 3 * self.heads + 6 * self.width)


_MARGIN = 0.85  # of the free memory: what the allocator and the head need beside; not measured yet


def choose_policy(
    sizes: LayerSizes, tokens: int, free: float, element: int = 2, among: Sequence[str] = POLICIES
) -> str:
    """The first policy of `among` whose activations fit in the free memory; else the last.

    Args:
        tokens: of the largest micro-batch.
        free: bytes of device memory that neither weights, gradients nor optimizer will take.
    """
    for policy in among:
        needed = sizes.kept_bytes(policy, tokens, element) + sizes.working_bytes(tokens, element)
        if needed <= _MARGIN * free:
            return policy
    return among[-1]


def free_bytes(model: torch.nn.Module, state_bytes: int = 12) -> float:
    """Device memory left for activations once `model` trains.

    Args:
        state_bytes: of each trained element beside its weight: gradient and two moments in float32.
    """
    if not torch.cuda.is_available():
        return float("inf")
    _, total = torch.cuda.mem_get_info()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    state = sum(p.numel() * state_bytes for p in model.parameters() if p.requires_grad)
    return float(total - weights - state)
