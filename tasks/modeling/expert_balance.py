"""The loss that spreads tokens evenly over a mixture's experts, row by row of a packed batch.

Of each row it is what Transformers' models add to their loss with `output_router_logits` (Switch
Transformer, arXiv 2101.03961, equations 4 to 6, over all layers together). It is no sum over
tokens, so a value for a whole micro-batch would depend on how rows are shared out to micro-batches
and processes; of single rows it does not, and padding, which belongs to no row, is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from regrow.tasks.stage import StageError


class Routers:
    """The routers of a model, whose logits are kept while the model computes.

    Args:
        model: a causal language model, or a `PeftModel` around one; as it will be called, with its
            adapter and kernels.
        coefficient: what the loss weighs; None: as the model's own configuration says.

    Raises:
        StageError: for a model that has no such loss.
    """

    def __init__(self, model: Any, coefficient: float | None = None) -> None:
        base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        config = base.config.get_text_config()
        own = getattr(config, "router_aux_loss_coef", None)
        # The model's own attribute where the configuration has it under another name (DBRX).
        top_k = getattr(base, "num_experts_per_tok", getattr(config, "num_experts_per_tok", None))
        routers = list(_routers(base))
        if not routers or own is None or not top_k:
            raise StageError(
                f"output_router_logits: Transformers has no loss for the balance of experts in "
                f"{type(base).__name__}; remove the key"
            )
        self.coefficient: float = own if coefficient is None else coefficient
        self.top_k: int = top_k
        self._logits: list[Tensor] | None = None
        for module, index in routers:
            module.register_forward_hook(_Keep(self, index))

    def keep(self, logits: Tensor) -> None:
        """Called by the routers; layers computed again in the backward pass are not counted."""
        if self._logits is not None:
            self._logits.append(logits)

    @contextmanager
    def listening(self) -> Iterator[list[Tensor]]:
        """Inside, the logits [T, experts] of each layer that computes are put into the list."""
        self._logits = found = []
        try:
            yield found
        finally:
            self._logits = None


@dataclass(frozen=True)
class _Keep:
    """A forward hook on a router."""

    routers: Routers
    index: int
    """Of the logits among what the router returns."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.routers.keep(output[self.index] if isinstance(output, tuple) else output)


def _routers(base: nn.Module) -> Iterator[tuple[nn.Module, int]]:
    """The modules whose outputs the model itself would give as `router_logits`."""
    for part in base.modules():
        recorders = (getattr(part, "_can_record_outputs", None) or {}).get("router_logits")
        if recorders is None:
            continue
        recorders = recorders if isinstance(recorders, list) else [recorders]
        for name, module in part.named_modules():
            for recorder in recorders:
                at = getattr(recorder, "layer_name", None)
                if isinstance(module, recorder.target_class) and (not at or at in name):
                    yield module, recorder.index
        return  # parts inside record the same ones


def balance_losses(logits: Sequence[Tensor], row_lengths: Sequence[int], top_k: int) -> Tensor:
    """The loss of each row: float32 [rows]; `top_k` where all experts get as many tokens.

    Args:
        logits: of each layer, [T, experts]; the rows one after the other, then padding.
        row_lengths: tokens of each row.
        top_k: experts that each token goes to.

    Raises:
        StageError: when no gradient can come of it.
    """
    tokens = sum(row_lengths)
    experts = logits[0].shape[-1]
    device = logits[0].device
    lengths_R = torch.tensor(row_lengths, device=device)
    rows_R = torch.arange(len(row_lengths), device=device)
    row_of_token = torch.repeat_interleave(rows_R, lengths_R, output_size=tokens)
    counts_RE = torch.zeros(len(row_lengths), experts, device=device)
    sums_RE = torch.zeros_like(counts_RE)
    # Layers before the first trained one have none, rightly.
    if torch.is_grad_enabled() and not any(layer.requires_grad for layer in logits):
        raise StageError(
            "output_router_logits: no router gives a gradient; with "
            "gradient_checkpointing_kwargs: {use_reentrant: true} there is none, use false"
        )
    for layer in logits:
        probabilities_TE = layer.reshape(-1, experts)[:tokens].softmax(-1).float()
        chosen_TK = probabilities_TE.topk(top_k, dim=-1).indices
        one_hot_TE = torch.zeros_like(probabilities_TE).scatter(1, chosen_TK, 1.0)
        counts_RE = counts_RE.index_add(0, row_of_token, one_hot_TE)
        sums_RE = sums_RE.index_add(0, row_of_token, probabilities_TE)
    seen_R = (lengths_R * len(logits))[:, None]
    return experts * ((counts_RE / seen_R) * (sums_RE / seen_R)).sum(-1)
