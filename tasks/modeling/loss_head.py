"""An output head that gives the loss without the logits: only rows with a label are multiplied.

A causal language model calls its head, then `loss_function` on what the head gave. While labels are
given, the head here keeps the hidden states and hands on no logits; the loss function then computes
cross entropy from them with the head's weight (`regrow.kernels.linear_cross_entropy`). Both are
called inside the model's forward, where FSDP2 has gathered the weight. Without labels it is the
head it was.

Where the last layer can, it is told which rows are wanted (`LAST_ROWS`): by an argument of the
model, that layers computed again later and several forward passes before one backward pass have
their own. The hidden states are those rows then.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from regrow.kernels.linear_cross_entropy import IGNORED, LOGITS_BYTES, linear_cross_entropy
from regrow.tasks.modeling.batches import LAST_ROWS, SUPERVISED_ROWS
from regrow.tasks.modeling.projections import in_compute_dtype
from regrow.tasks.modeling.rounded_weights import RoundedWeights


@dataclass(frozen=True)
class LossTerms:
    """What training's loss has beside cross entropy; a validation has neither."""

    label_smoothing: float = 0.0
    z_loss: float = 0.0


class LossHead(nn.Linear):
    """The head [V, H] with its weight in the same place, and the loss function that goes with it.

    Args:
        softcap: of the logits (Gemma 2), which the model itself would apply to them.
    """

    def __init__(self, head: nn.Linear, softcap: float | None, terms: LossTerms) -> None:
        super().__init__(head.in_features, head.out_features, bias=False, device="meta")
        self.weight = head.weight
        self._softcap, self._terms = softcap, terms
        self._has_labels = False
        self._rows_n: Tensor | None = None
        self._hidden: Tensor | None = None
        self.rounded: RoundedWeights | None = None
        self.logits_bytes = LOGITS_BYTES
        self.last_layer_takes_rows = False

    def listen(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """A forward pre-hook, with keywords, of the outermost model: whether labels are given."""
        kept = {name: x for name, x in kwargs.items() if name not in (SUPERVISED_ROWS, LAST_ROWS)}
        self._rows_n, last_n = kwargs.get(SUPERVISED_ROWS), kwargs.get(LAST_ROWS)
        self._has_labels = kwargs.get("labels") is not None
        self._hidden = None
        takes = self.last_layer_takes_rows and not torch.compiler.is_compiling()
        if takes and self._has_labels and last_n is not None:
            kept[LAST_ROWS] = last_n
        return args, kept

    def forward(self, input: Tensor) -> Tensor:
        """Logits; while labels are given none at all: [..., 0, V]."""
        if not self._has_labels:
            return super().forward(input)
        self._hidden = input
        return input.new_empty(*input.shape[:-2], 0, self.out_features)

    def loss(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        last_layer_rows: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """What a model's `loss_function` is called with; the mean over items, float32 []."""
        assert self._hidden is not None, "the head was not called"
        assert not isinstance(self.weight, DTensor), "the head's weight is not gathered"
        hidden, self._hidden = in_compute_dtype(self._hidden), None
        targets_N = _targets(labels, hidden.shape[-2], last_layer_rows)
        rows_n = self._rows_n
        if last_layer_rows is not None:
            assert rows_n is not None, "the rows of the last layer come with the supervised ones"
            rows_n = torch.searchsorted(last_layer_rows, rows_n)
        terms = self._terms if self.training else LossTerms()
        keeps = self.weight.dtype in (hidden.dtype, torch.float32)  # its gradient's type, too
        with torch.autocast(hidden.device.type, enabled=False):
            return linear_cross_entropy(
                hidden.flatten(0, -2),
                self.weight if keeps else self.weight.to(hidden.dtype),
                targets_N,
                rounded_VH=self.rounded and self.rounded.of(self.weight, hidden.dtype),
                rows_n=rows_n,
                normalizer=num_items_in_batch,
                softcap=self._softcap,
                label_smoothing=terms.label_smoothing,
                z_loss=terms.z_loss,
                logits_bytes=self.logits_bytes,
            )


def _targets(labels: Tensor, tokens: int, rows_n: Tensor | None) -> Tensor:
    """int64 [N]: the token that each hidden state should give; `rows_n`: where they stand."""
    targets = nn.functional.pad(labels, (0, 1), value=IGNORED)[..., 1:]
    if rows_n is not None:
        return targets.flatten().index_select(0, rows_n)
    return targets[..., :tokens].flatten()  # of a slice of a row the labels are one more
