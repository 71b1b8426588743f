"""How much of a layer is computed again in the backward pass: policies of gradient checkpointing.

A policy is said in the words of `torch.utils.checkpoint` alone, so that any model that checkpoints
its layers takes it. Which one fits a device is for `regrow.tasks.train.fitting` to say.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers.modeling_layers import GradientCheckpointingLayer

from regrow.kernels.linear_cross_entropy import SCARCE_LOGITS_BYTES
from regrow.kernels.lora_mlp import SCARCE_SLICE_BYTES
from regrow.tasks.modeling.fused import FusedMLP
from regrow.tasks.modeling.fused_layer import can_take_rows
from regrow.tasks.modeling.loss_head import LossHead

POLICIES = ("none", "selective", "full", "offload")
"""none: all activations stay. selective: attention's results stay, the rest is computed again.
full: only each layer's input stays. offload: even that waits in the host's memory."""

# Operations whose results stay under "selective": each attention of `kernels.packed_attention`.
# Their cost grows with the square of the length, their results do not (Korthikanti et al. 2022,
# arXiv 2205.05198, section 5, keeps the others for the same reason in reverse). FlashAttention's
# packages name theirs by version, in namespaces of their own; what its version 4 launches without
# telling torch is computed again.
_KEPT = (
    "_flash_attention_forward",
    "_varlen_attn",
    "cudnn_attention",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
)


def checkpoint_arguments(
    policy: str, use_reentrant: bool, repeats_itself: bool = False
) -> dict[str, Any] | None:
    """Arguments of `torch.utils.checkpoint.checkpoint`; None where nothing is computed again.

    Args:
        repeats_itself: a layer does the same a second time by its nature, so torch need neither
            keep the state of random numbers nor compare the shapes of all that is saved: 2 to 3 %
            of the host's time for a layer (Llama's kind with LoRA, 2026-11-23), which is what steps
            in little memory wait for on a slow host.
    """
    assert policy in POLICIES, policy
    if policy == "none":
        return None
    how: dict[str, Any] = {"use_reentrant": use_reentrant and policy != "selective"}
    if policy == "selective":
        how["context_fn"] = functools.partial(create_selective_checkpoint_contexts, keep_attention)
    if repeats_itself:
        how |= {"preserve_rng_state": False, "determinism_check": "none"}
    return how


def repeats_itself(model: Any) -> bool:
    """Whether every layer is computed by modules of ours, and none of them draws numbers."""
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    draws = any(isinstance(m, nn.Dropout) and m.p > 0 for layer in layers for m in layer.modules())
    return bool(layers) and all(can_take_rows(layer) for layer in layers) and not draws


def keep_attention(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """torch's policy function: what becomes of one operation's result."""
    return CheckpointPolicy.MUST_SAVE if _attends(str(operation)) else _RECOMPUTED


_PACKAGE, _FORWARD = "flash_attn", ("fwd", "forward")
_RECOMPUTED = CheckpointPolicy.PREFER_RECOMPUTE


def _attends(operation: str) -> bool:
    """Whether "namespace.name.overload" is a forward pass of attention."""
    namespace, _, rest = operation.partition(".")
    name = rest.partition(".")[0]
    of_package = namespace.startswith(_PACKAGE) and any(word in name for word in _FORWARD)
    return name in _KEPT or of_package


def take_smaller_parts(model: Any) -> None:
    """Of the logits and of each MLP's tokens at a time, where memory is short.

    The result is the same, but for dropout inside the MLP: each slice draws masks of its own.
    """
    for module in model.modules():
        if isinstance(module, LossHead):
            module.logits_bytes = SCARCE_LOGITS_BYTES
        if isinstance(module, FusedMLP):
            module.slice_bytes = SCARCE_SLICE_BYTES


def recompute_layers(model: Any, policy: str, use_reentrant: bool) -> None:
    """Let a Transformers model, or PEFT's cover of one, follow a policy from now on.

    Where even the layers' inputs leave the device, logits and MLPs take smaller parts as well.
    Not through `TrainingArguments`: reporters write those as JSON, which functions are not.
    """
    if policy == "offload":
        take_smaller_parts(model)
    how = checkpoint_arguments(policy, use_reentrant, repeats_itself(model))
    if how is None:
        return
    # Transformers renamed it in 5.23.
    new: Any = getattr(model, "activation_checkpointing_enable", None)
    enable: Any = new or model.gradient_checkpointing_enable
    enable(how)
