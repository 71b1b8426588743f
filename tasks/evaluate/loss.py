"""Loss and accuracy of a model on held-out packed rows.

Shape legend: T tokens of a batch, S of them supervised (targets to be predicted), V vocabulary.
"""

from __future__ import annotations

import inspect
import math
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from regrow.tasks.modeling.batches import IGNORED, PackedRow, flatten
from regrow.tasks.stage import Reporter, StageError

# Rows of logits turned into float32 at a time: 512 x 150 000 x 4 bytes are 0.3 GB.
_CHUNK = 512


class Rows(Protocol):
    """Packed rows by position, as `regrow.tasks.modeling.rows.PackedRows` gives them."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> PackedRow: ...


def validation_scores(
    model: PreTrainedModel, rows: Rows, batch_size: int, report: Reporter
) -> dict[str, Any]:
    """Mean loss over supervised tokens, and what follows from it.

    Args:
        model: loaded with attention "regrow_packed", on its device.
        rows: of the validation split.
        batch_size: rows in one forward pass.

    Returns:
        `loss` (nats a token, log-softmax in float32), `perplexity`, `token_accuracy` (share of
        supervised tokens that are the most likely one), `supervised_tokens`.

    Raises:
        StageError: when nothing is supervised, or the loss is not a number.
    """
    nll, correct, supervised = 0.0, 0, 0
    for start in range(0, len(rows), batch_size):
        batch = [rows[i] for i in range(start, min(start + batch_size, len(rows)))]
        logits_SV, targets_S = _supervised_logits(model, flatten(batch))
        for part_V, part_targets in zip(
            logits_SV.split(_CHUNK), targets_S.split(_CHUNK), strict=True
        ):
            log_p = torch.log_softmax(part_V.float(), dim=-1)
            nll -= log_p.gather(1, part_targets[:, None]).sum(dtype=torch.float64).item()
            correct += int((part_V.argmax(dim=-1) == part_targets).sum())
        supervised += len(targets_S)
        report.progress(start + len(batch), len(rows), "rows", "validation loss")
    if not supervised:
        raise StageError(
            "the validation split has no supervised token; check roles_to_train and train_on_inputs"
        )
    return _scores(nll / supervised, correct, supervised)


def _scores(loss: float, correct: int, supervised: int) -> dict[str, Any]:
    if not math.isfinite(loss):
        raise StageError(
            f"the validation loss is {loss}: the weights have diverged; lower learning_rate, or "
            "set max_grad_norm"
        )
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),  # e**710 is beyond a float
        "token_accuracy": correct / supervised,
        "supervised_tokens": supervised,
    }


@torch.inference_mode()
def _supervised_logits(model: PreTrainedModel, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Logits [S, V] at the tokens before the supervised ones, and the supervised tokens [S].

    Most models can be asked for the logits of some tokens only (`logits_to_keep`), which spares the
    memory of [T, V].
    """
    device = model.device
    labels_T = batch.pop("labels")[0]
    targets = torch.nonzero(labels_T != IGNORED)[:, 0]
    inputs = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in batch.items()}
    before = (targets - 1).to(device)
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        logits = model(**inputs, logits_to_keep=before, use_cache=False).logits[0]
    else:
        logits = model(**inputs, use_cache=False).logits[0, before]
    return logits, labels_T[targets].to(device)
