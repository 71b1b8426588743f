"""How well a merged model does what its base and adapter did: their logits compared.

Both are computed in float32, so that the only difference left is the rounding of the merged
weights, and any mistake in merging. Root mean squares over all logits are compared, not the largest
difference: one logit of twenty million says little, and jumps about.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regrow.tasks.modeling.batches import flatten
from regrow.tasks.modeling.rows import PackedRows, Row

MAX_TOKENS = 512  # enough for millions of logits; a minute for a model of 8 B on a CPU

FLOOR = 0.01
"""Difference that is always allowed, as a share of the logits' standard deviation. Rounding alone
makes 0.002 to 0.007 (measured on SmolLM2-135M-Instruct), so an adapter that changes next to nothing
does not fail for it."""


@dataclass(frozen=True)
class Fidelity:
    """Differences between the logits of the merged model and those of base and adapter."""

    tokens: int
    logit_scale: float
    """Standard deviation of the logits of base and adapter."""
    adapter_effect: float
    """Root mean square of what the adapter changes in the base's logits."""
    rms_logit_difference: float
    max_logit_difference: float
    changed_choices: float
    """Share of tokens whose most likely successor differs."""

    def allowed(self, tolerance: float) -> float:
        """The largest `rms_logit_difference` that is no fault."""
        return max(tolerance * self.adapter_effect, FLOOR * self.logit_scale)


def probe_batch(prepared: Path) -> dict[str, Any]:
    """Up to `MAX_TOKENS` tokens of held-out rows (of training rows where there are none)."""
    split = "validation" if PackedRows.has(prepared, "validation") else "train"
    rows = PackedRows(prepared, split)
    chosen, room = [], MAX_TOKENS
    for index in range(len(rows)):
        row = _cut(rows[index], room)
        chosen.append(row)
        room -= len(row.input_ids)
        if room == 0:
            break
    batch = flatten(chosen)
    del batch["labels"]
    return batch


def _cut(row: Row, most: int) -> Row:
    """The row's first `most` tokens; the last example is cut short."""
    ends = np.minimum(np.cumsum(row.seq_lens), most)
    lengths = np.diff(ends, prepend=0)
    return Row(row.input_ids[:most], row.loss_mask[:most], lengths[lengths > 0])


@torch.no_grad()
def logits_of(model: Any, batch: dict[str, Any]) -> Tensor:
    """Logits [T, V] in float32."""
    return model.eval()(**batch).logits[0].float()


def compare(base_TV: Tensor, adapted_TV: Tensor, merged_TV: Tensor) -> Fidelity:
    """The merged model's logits against those of base and adapter."""
    difference = merged_TV - adapted_TV
    return Fidelity(
        tokens=len(adapted_TV),
        logit_scale=adapted_TV.std().item(),
        adapter_effect=_rms(adapted_TV - base_TV),
        rms_logit_difference=_rms(difference),
        max_logit_difference=difference.abs().max().item(),
        changed_choices=(merged_TV.argmax(-1) != adapted_TV.argmax(-1)).double().mean().item(),
    )


def _rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()
