"""How well a merged model does what its base and adapter did: their logits compared.

Both are computed in float32, so that the only difference left is the rounding of the merged
weights, and any mistake in merging. Root mean squares over the logits are compared, not the largest
difference: one logit of twenty million says little, and jumps about. So may a whole token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from regrow.tasks.modeling.batches import flatten
from regrow.tasks.modeling.rows import PackedRows, Row

MAX_TOKENS = 512  # enough for millions of logits

JUMPING = 0.05
"""Share of the tokens, those with the largest differences, that a root mean square leaves out. At
some tokens a few attention scores are nearly even, and the least rounding tips the whole token
over: of 12 random adapters of SmolLM2-135M-Instruct 3 had one or two such tokens in 512, which
lifted the difference from 0.15 .. 0.23 of the adapter's effect to 0.27 .. 0.89 (measured
2026-11-23). A mistake in merging is in every token."""

ROUNDING_FLOOR = 0.025
"""Difference through rounded weights that is no fault, as a share of the logits' standard
deviation: computing in bfloat16 makes 0.023 to 0.027 by itself (measured on SmolLM2-135M-Instruct).
Without it an adapter that changes next to nothing would fail."""

EXACT = 1e-4
"""The same before weights are rounded. Measured: 2e-6; a scale wrong by a factor of 2 makes half of
what the adapter changes, some 1e-2 after a few steps."""

EXACT_ANYWHERE = 1e-2
"""The same at any one token, so that no mistake in a few of them is left out as jumping. Measured:
1.3e-3 at the token of those adapters that jumps most."""


@dataclass(frozen=True)
class Fidelity:
    """Differences between the logits of the merged model and those of base and adapter."""

    tokens: int
    logit_scale: float
    """Standard deviation of the logits of base and adapter."""
    adapter_effect: float
    """Root mean square of what the adapter changes in the base's logits (as all root mean squares
    here: without the tokens that jump, see `JUMPING`)."""
    merge_error: float
    """Root mean square of the difference before the merged weights are rounded."""
    largest_merge_error: float
    """The same at the one token where it is largest."""
    rms_logit_difference: float
    """Root mean square of the difference after rounding, as stored."""
    max_logit_difference: float
    """The largest difference of any logit, as stored."""
    changed_choices: float
    """Share of tokens whose most likely successor differs."""
    quantization_effect: float | None = None
    """Root mean square of what the quantization of the base's weights in training changes in the
    logits of base and adapter: the merged model stands on the unquantized base. (int8 rounds the
    layers' inputs as well, which is not in it.) None: not quantized, or bitsandbytes is missing."""

    def allowed(self, tolerance: float) -> float:
        """The largest `rms_logit_difference` that is no fault."""
        return max(tolerance * self.adapter_effect, ROUNDING_FLOOR * self.logit_scale)

    def fault(self, tolerance: float) -> str | None:
        """What is wrong with the merged model, or None."""
        merging = "merging by itself, before any rounding, changes the logits"
        most, anywhere = EXACT * self.logit_scale, EXACT_ANYWHERE * self.logit_scale
        if not self.merge_error <= most:  # so that NaN is a fault too
            return f"{merging} by {self.merge_error:.4g}, where {most:.4g} would be arithmetic"
        if not self.largest_merge_error <= anywhere:
            return (
                f"{merging} of one token by {self.largest_merge_error:.4g}, where {anywhere:.4g} "
                "would be arithmetic"
            )
        if not self.rms_logit_difference <= self.allowed(tolerance):
            return f"at most {self.allowed(tolerance):.4g} is allowed"
        return None

    def __str__(self) -> str:
        quantized = ""
        if self.quantization_effect is not None:
            quantized = (
                f"; the base's quantization in training, which the merged model is without, "
                f"changed {self.quantization_effect:.4g}"
            )
        return (
            f"the merged model's logits differ from those of base and adapter by "
            f"{self.rms_logit_difference:.4g} (root mean square over {self.tokens} tokens; any at "
            f"most {self.max_logit_difference:.4g}), where the adapter changes "
            f"{self.adapter_effect:.4g}{quantized}"
        )


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


def compare(
    base_TV: Tensor,
    adapted_TV: Tensor,
    merged_TV: Tensor,
    stored_TV: Tensor,
    trained_TV: Tensor | None = None,
) -> Fidelity:
    """The merged model's logits, in float32 and as stored, against those of base and adapter.

    Args:
        trained_TV: of the adapter on the quantized base that it was trained on.
    """
    merging_TV, difference = merged_TV - adapted_TV, stored_TV - adapted_TV
    return Fidelity(
        tokens=len(adapted_TV),
        logit_scale=adapted_TV.std().item(),
        adapter_effect=_rms(adapted_TV - base_TV),
        merge_error=_rms(merging_TV),
        largest_merge_error=merging_TV.double().square().mean(-1).max().sqrt().item(),
        rms_logit_difference=_rms(difference),
        max_logit_difference=difference.abs().max().item(),
        changed_choices=(stored_TV.argmax(-1) != adapted_TV.argmax(-1)).double().mean().item(),
        quantization_effect=None if trained_TV is None else _rms(trained_TV - adapted_TV),
    )


def _rms(x_TV: Tensor) -> float:
    """Root mean square over all but the tokens where it is largest, a share of `JUMPING`.

    NaN if anything is no number, or infinite: that is no rounding.
    """
    squares_T = x_TV.double().square().mean(-1)
    if not squares_T.isfinite().all():
        return math.nan
    steady = len(squares_T) - int(JUMPING * len(squares_T))
    return squares_T.sort().values[:steady].mean().sqrt().item()
