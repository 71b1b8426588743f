"""Losses beside plain cross entropy: label smoothing and z-loss, over the supervised tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from regrow.tasks.modeling.batches import IGNORED

Loss = Callable[..., Tensor]
"""(model outputs, labels [1, T], num_items_in_batch) -> the sum over tokens / num_items."""


def loss_function(label_smoothing: float, z_loss: float) -> Loss | None:
    """What the Trainer takes as `compute_loss_func`; None where the model's own loss will do.

    Args:
        label_smoothing: share of the target's probability given to all tokens alike (Szegedy et al.
            2015, arXiv 1512.00567).
        z_loss: weight of the squared log-sum-exp of the logits (PaLM, arXiv 2204.02311).
    """
    if not label_smoothing and not z_loss:
        return None

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        per_token = token_losses(outputs.logits, labels, label_smoothing, z_loss)
        return per_token.sum() / (1 if num_items_in_batch is None else num_items_in_batch)

    return loss


def token_losses(logits: Tensor, labels: Tensor, label_smoothing: float, z_loss: float) -> Tensor:
    """Losses of the supervised tokens: float32 [supervised].

    Args:
        logits: [1, T, V]; those at t predict the label at t + 1.
        labels: int64 [1, T], `IGNORED` where nothing is learnt; [1, T + 1] where the last logits
            have a label too, see `regrow.tasks.modeling.context_slices`.
    """
    targets = labels[:, 1:].reshape(-1)
    learnt = targets != IGNORED
    logits_SV = logits[:, : labels.shape[1] - 1].reshape(-1, logits.shape[-1])[learnt].float()
    log_sum = torch.logsumexp(logits_SV, dim=-1)
    chosen = logits_SV.gather(-1, targets[learnt][:, None])[:, 0]
    losses = log_sum - (1 - label_smoothing) * chosen
    if label_smoothing:
        losses = losses - label_smoothing * logits_SV.mean(-1)
    return losses + z_loss * log_sum.square() if z_loss else losses
