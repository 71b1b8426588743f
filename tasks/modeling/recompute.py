"""How much of a layer is computed again in the backward pass: policies of gradient checkpointing.

A policy is said in the words of `torch.utils.checkpoint` alone, so that any model that checkpoints
its layers takes it. Which one fits a device is for `regrow.tasks.train.fitting` to say.
"""

from __future__ import annotations

import functools
from typing import Any

from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from regrow.kernels.linear_cross_entropy import SCARCE_LOGITS_BYTES
from regrow.kernels.lora_mlp import SCARCE_SLICE_BYTES
from regrow.tasks.modeling.fused import FusedMLP
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
    how = checkpoint_arguments(policy, use_reentrant)
    if how is None:
        return
    # Transformers renamed it in 5.23.
    new: Any = getattr(model, "activation_checkpointing_enable", None)
    enable: Any = new or model.gradient_checkpointing_enable
    enable(how)
