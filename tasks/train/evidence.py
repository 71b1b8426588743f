"""What is kept of a micro-batch whose loss is no number: which rows it was, and their tokens."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regrow.tasks.stage import StageError
from regrow.tasks.train.loader import MicroBatches

DIVERGED = (
    "training has diverged. Lower learning_rate, raise warmup_steps, or set bf16: false; and look "
    "for damaged examples in the data"
)


@dataclass
class StepLosses:
    """The losses of one step's micro-batches on this rank, still on the device."""

    step: int
    """0-based: steps done before it."""
    micro: list[Tensor] = field(default_factory=list)


def evidence_name(rank: int) -> str:
    """The file of a rank, in the attempt's directory."""
    return f"non-finite-rank-{rank:05d}.json"


def keep_evidence(losses: StepLosses, batches: MicroBatches, path: Path) -> None:
    """Write down the first micro-batch whose loss is no number, if there is one.

    Raises:
        StageError: when there is one, naming its rows.
    """
    if not losses.micro:
        return
    values = torch.stack([loss.detach().float() for loss in losses.micro]).tolist()
    finite = torch.isfinite(torch.tensor(values)).tolist()
    if all(finite):
        return
    micro = finite.index(False)
    rows = batches.indices(losses.step, micro)
    record = {
        "step": losses.step + 1,
        "micro_batch": micro,
        "loss": str(values[micro]),
        "losses_of_the_step": [str(value) for value in values],
        "rows": [_described(batches, row) for row in rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1))
    raise StageError(
        f"loss is {values[micro]} at step {losses.step + 1}, in micro-batch {micro} (kept in "
        f"{path.name}), rows {', '.join(map(str, rows))} of the prepared data: {DIVERGED}"
    )


def _described(batches: MicroBatches, index: int) -> dict[str, Any]:
    row = batches.row(index)
    shard, within = batches.position(index)
    return {
        "row": index,
        "shard": shard,
        "row_in_shard": within,
        "seq_lens": [int(length) for length in row.seq_lens],
        "input_ids": [int(token) for token in row.input_ids],
        "loss_mask": [int(learnt) for learnt in row.loss_mask],
    }
